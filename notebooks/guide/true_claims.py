"""A reward of your own that reads the reasoning about drawn scenes: the share of true claims.

    mig-kit run 05 06 --from default --run-id true -p reward_weights "{true_claims: 0.3}" \
        -p rewards "[format, image, box, choice, notebooks/guide/true_claims.py:true_claims]"
"""

from mig_kit.world.claims import read_claims


def true_claims(answer, sample):
    """The share of a reply's distinct claims that are true, 0..1.

    0 unless it lists every image in question; None for questions whose scenes are not known. What
    the notes leave open does not count.
    """
    if not sample.notes:
        return None
    asked = {image for claim in read_claims(f"<think>{' '.join(sample.notes)}</think>", sample)
             for image in claim.images}
    claims = {answer.text[claim.start:claim.end]: claim
              for claim in read_claims(answer.text, sample)}.values()
    told = {image for claim in claims if claim.kind in ("list", "detail") for image in claim.images}
    judged = [claim.is_true for claim in claims if claim.is_true is not None]
    return sum(judged) / len(judged) if judged and asked <= told else 0.0

"""Which parameters of stage 04 can act together; the others are refused."""


def check_curation_params(params: dict) -> None:
    """ValueError, a sentence with the remedy, where a parameter of 04 could not act; params: all of
    it.
    """
    if params["kept_prompts"] and params["curate"] != "random":
        raise ValueError("kept_prompts acts with curate 'random' only; with 'pass_rate' as many "
                         "prompts are kept as have a fitting one: set kept_prompts to 0")
    if params["kept_prompts"] < 0:
        raise ValueError(f"kept_prompts is {params['kept_prompts']}; give a number of prompts, or "
                         "0 for per_task of each task")
    if params["replies"] < 1 and params["curate"] == "pass_rate":
        raise ValueError(f"replies is {params['replies']}, and 04 needs one or more to each prompt "
                         "for a pass rate; for 06 without them run it by itself: mig-kit run 06 "
                         "-p replies 0")

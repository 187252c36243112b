"""Direct supervision of the tiny base's attention (notebook 90)."""

import torch
from torch import nn

from tiny_base import attention

# Layers and heads that are supervised: which attend to objects, to the numbers that announce
# images, and to the numbers in questions.
OBJECT_LAYER, OBJECT_HEADS = 2, (0, 2, 4, 6)
NUMBER_LAYER, NUMBER_HEADS = 0, (1, 5)
QUESTION_LAYER, QUESTION_HEADS = 1, (1, 5)


class AttentionSupervision(nn.Module):
    """Supervises look-ups of the language model, which otherwise form only after a long plateau.

    OBJECT_HEADS attend from words about an object to its token, NUMBER_HEADS from an image token or
    a listed name to its number. With `questions`, QUESTION_HEADS attend to the number in the
    question, and a linear reader, thrown away later, reads that number from the input of
    OBJECT_LAYER.
    """

    def __init__(self, model, questions: bool):
        super().__init__()
        language = model.model.language_model
        watched = [NUMBER_LAYER, OBJECT_LAYER, *([QUESTION_LAYER] if questions else [])]
        # tuples, so that the model's weights do not become this module's
        self.attentions = tuple(layer.self_attn for layer in language.layers)
        self.watched_attentions = tuple(self.attentions[number] for number in watched)
        for module in self.watched_attentions:
            module.keep_weights = True
        for module in self.attentions:
            module.in_blocks = True
        self.attended: dict[int, list[torch.Tensor]] = {}  # weights of the last pass, by layer
        self.object_layer_input: torch.Tensor  # of the last pass
        self.hooks = [self._watch_attention(number) for number in watched]
        norm = language.layers[OBJECT_LAYER].input_layernorm
        self.hooks.append(norm.register_forward_hook(self._keep_input))
        width, vocabulary = language.config.hidden_size, language.config.vocab_size
        self.reader = nn.Linear(width, vocabulary) if questions else None

    def _watch_attention(self, layer: int):
        def keep_weights(module, inputs, outputs) -> None:
            self.attended[layer] = outputs[1]

        return self.attentions[layer].register_forward_hook(keep_weights)

    def _keep_input(self, module, inputs, output: torch.Tensor) -> None:
        self.object_layer_input = output

    def forward(self, ids: torch.Tensor, object_token: torch.Tensor,
                image_number_token: torch.Tensor,
                question_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of the model's last pass, attention from first words to their object).

        All arguments are (rows, tokens), as in `TokenRow`.
        """
        # a token is predicted from the one before it
        object_token, question_token = object_token[:, 1:], question_token[:, 1:]
        if not ((object_token >= 0).any() and (image_number_token >= 0).any()):
            return torch.zeros(()), torch.zeros(())
        to_object = _attention_to(self.attended[OBJECT_LAYER], object_token, OBJECT_HEADS)
        to_number = _attention_to(self.attended[NUMBER_LAYER], image_number_token, NUMBER_HEADS)
        is_first = (object_token != torch.roll(object_token, 1, 1))[object_token >= 0]
        weight = 1 + 3 * is_first.float()  # once a digit is written, it gives the object away
        object_loss = (to_object.log() * weight[:, None]).mean() / weight.mean()
        loss = -0.5 * object_loss - 0.5 * to_number.log().mean()
        first_words = to_object[is_first].mean().detach()
        if self.reader is None or not (question_token >= 0).any():
            return loss, first_words
        to_question = _attention_to(self.attended[QUESTION_LAYER], question_token, QUESTION_HEADS)
        loss = loss - 0.5 * to_question.log().mean()
        states = self.object_layer_input
        loss = loss + 0.5 * self._reader_loss(ids, image_number_token, states)
        return loss + 0.5 * self._reader_loss(ids, question_token, states[:, :-1]), first_words

    def _reader_loss(self, ids: torch.Tensor, number_token: torch.Tensor,
                     states: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of reading the number at `number_token` from the state beside it."""
        has_number = number_token >= 0
        number = ids.gather(1, number_token.clamp(min=0))[has_number]
        return nn.functional.cross_entropy(self.reader(states[has_number]).float(), number)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()
        for module in self.watched_attentions:
            module.keep_weights = False
        for module in self.attentions:
            module.in_blocks = False


def _attention_to(blocks: list[torch.Tensor], target: torch.Tensor,
                  heads: tuple[int, ...]) -> torch.Tensor:
    """(positions, heads) attention from each position with a target to it, at least 1e-6.

    blocks: the weights in blocks, as `attention` gives them. target: (rows, tokens), -1 for none.
    """
    row, position = (target >= 0).nonzero(as_tuple=True)
    target_position = target[row, position]
    indices, values = [], []
    for number, weights in enumerate(blocks):
        inside = (position // attention.BLOCK == number).nonzero()[:, 0]
        query = position[inside] % attention.BLOCK
        values.append(weights[row[inside, None], torch.tensor(heads), query[:, None],
                              target_position[inside, None]].float().clamp(min=1e-6))
        indices.append(inside)
    return torch.cat(values)[torch.cat(indices).argsort()]

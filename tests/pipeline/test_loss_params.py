"""Losses of stage 05: what cannot act is refused with the remedy, before any kernel starts."""

import papermill
import pytest
from click.testing import CliRunner

from mig_kit.cli import cli
from mig_kit.pipeline.params import validate_params

SINGLE = "with num_iterations 1 the ratio of new to old probabilities is exactly 1"
TWICE = {"num_iterations": 2}
SEQUENCE = {"importance_sampling_level": "sequence"}
REFUSED = [
    ({"loss_type": "sapo"}, f"{SINGLE}, and loss_type sapo is then grpo; use grpo, or set num_"),
    ({"loss_type": "vespo"}, "loss_type vespo is then dapo; use dapo"),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type cispo is then dapo; use dapo"),
    ({"loss_type": "luspo", **SEQUENCE},
     "luspo is then dr_grpo times max_completion_length; use dr_grpo, or"),
    (SEQUENCE, f"{SINGLE}, for a token and for a sequence; set num_iterations to 2"),
    ({"epsilon": 0.1}, "so epsilon has nothing to clip; set num_iterations to 2 or more"),
    ({"epsilon_high": 0.28}, "so epsilon_high has nothing to clip"),
    ({"loss_type": "bnpo", "gradient_accumulation_steps": 1}, "use dapo, or raise gradient_acc"),
    ({"loss_type": "sapo", "epsilon": 0.1, **TWICE}, "loss_type sapo does not read epsilon;"),
    ({"loss_type": "vespo", "epsilon_high": 0.3, **TWICE}, "vespo does not read epsilon_high"),
    ({"loss_type": "cispo", "epsilon": 0.3, "epsilon_high": 5.0, **TWICE},
     "loss_type cispo does not read epsilon;"),
    ({"loss_type": "cispo", "epsilon_high": 0.28, **TWICE},
     "so 0.28 would multiply nearly every gradient by it; set epsilon_high to 1 or more"),
    ({"loss_type": "cispo", **TWICE}, "so 0.2 would multiply nearly every gradient by it"),
    ({"loss_type": "luspo", **TWICE}, "set importance_sampling_level to sequence"),
    ({"loss_type": "vespo", **TWICE, **SEQUENCE}, "set importance_sampling_level to token"),
    ({"loss_type": "vespo", "server": "http://a/v1", **TWICE},
     "set vllm_importance_sampling_mode to token_truncate or token_mask"),
    ({"vllm_importance_sampling_mode": "token_mask"}, "name a server, or take vllm_importance_s"),
    ({"vllm_importance_sampling_clip_max": 2.0}, "clip_max corrects what a server drew"),
    ({"top_entropy_quantile": 0.2, **TWICE, **SEQUENCE}, "set one of the two back"),
    ({"num_iterations": 0}, "num_iterations is 0; use 1 or more"),
    ({"epsilon": -0.1, **TWICE}, "epsilon is -0.1; use 0 or more"),
    ({"top_entropy_quantile": 20.0}, "top_entropy_quantile is 20.0; it is a share"),
]
OFFERED = [
    {}, {"epsilon": 0.2, "epsilon_high": 0.0}, {"loss_type": "bnpo"}, {"loss_type": "dr_grpo"},
    {"top_entropy_quantile": 0.2, "mask_truncated_completions": True}, {"num_iterations": 4},
    {"epsilon": 0.1, "epsilon_high": 0.28, **TWICE}, {"loss_type": "sapo", **TWICE, **SEQUENCE},
    {"loss_type": "cispo", "epsilon_high": 5.0, "top_entropy_quantile": 0.2, **TWICE, **SEQUENCE},
    {"loss_type": "luspo", **TWICE, **SEQUENCE}, {"loss_type": "vespo", **TWICE},
    {"loss_type": "vespo", "server": "http://a/v1", "vllm_importance_sampling_mode": "token_mask",
     **TWICE},
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_act_is_refused(values, sentence):
    with pytest.raises(ValueError) as error:
        validate_params(values, "05_grpo")
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("values", OFFERED, ids=str)
def test_what_acts_is_not_refused(values):
    assert values.items() <= validate_params(values, "05_grpo").items()


def test_the_command_line_refuses_before_a_kernel_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(papermill, "execute_notebook",
                        lambda *arguments, **options: pytest.fail("a kernel would start"))
    result = CliRunner().invoke(cli, ["run", "04", "05", "-p", "epsilon", "0.1"])
    assert "so epsilon has nothing to clip" in str(result.exception)
    assert not (tmp_path / "runs").exists()

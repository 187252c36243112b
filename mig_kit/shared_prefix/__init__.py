"""GRPO that reads every prompt once per group."""

from importlib.util import find_spec

if missing := [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]:
    raise ModuleNotFoundError(f"{missing[0]} is not installed; mig_kit.shared_prefix needs: "
                              "pip install 'mig-kit[trainer]'", name=missing[0])

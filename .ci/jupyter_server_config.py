"""What `make lab` starts JupyterLab with: a saved notebook keeps the metadata that git holds."""

METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}


def keep_metadata(model, **_):
    """JupyterLab would write the kernel's version and display name."""
    if model["type"] == "notebook":
        model["content"]["metadata"] = METADATA


get_config().ContentsManager.pre_save_hook = keep_metadata  # noqa: F821, of Jupyter

"""Networks with published weights: timm models by name, and models of the Hugging Face hub.

The weights are looked for in the local hub cache first, then fetched; only `model.safetensors` is
ever read, because a pickle runs whatever code it holds.
"""

import difflib
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn


def pretrained_network(name: str, *, offline: bool = False) -> tuple[str, nn.Module]:
    """A slug and the network without its classifier. `name` is a timm model or `hf-hub:ID`;
    `offline` looks on this machine only.

    timm reads only files that were fetched here. `ValueError` when it knows no such model, when no
    weights are published, or when they are neither on this machine nor within reach.
    """
    if name.startswith("hf-hub:"):
        repository = name.removeprefix("hf-hub:")
        snapshot = _fetch(name, repository, "model.safetensors", offline).parent
        _fetch(name, f"{repository.partition('@')[0]}@{snapshot.name}", "config.json", offline)
        source = f"local-dir:{snapshot}"
        return repository, timm.create_model(source, pretrained=True, num_classes=0)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"{name!r} is neither a folder nor a model that timm knows; "
            f"{did_you_mean(architecture)}"
        )
    tags = timm.list_pretrained(f"{architecture}.*")
    card = timm.get_pretrained_cfg(name) if name in tags or (tags and not tag) else None
    if card is None or card.hf_hub_id is None:
        known = f"choose one of {tags[:5]}" if tags else "train one with conditioning.pretrain"
        raise ValueError(f"timm has no pretrained weights for {name!r}; {known}")
    weights = _fetch(name, card.hf_hub_id, "model.safetensors", offline)
    network = timm.create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(weights)}
    )
    return f"{architecture}.{card.tag}", network


def _fetch(name: str, repository: str, filename: str, offline: bool) -> Path:
    """The file in the local hub cache; it is downloaded only if it is not there, and not
    `offline`.
    """
    repo_id, _, revision = repository.partition("@")
    try:
        try:
            return Path(
                hf_hub_download(
                    repo_id, filename, revision=revision or None, local_files_only=True
                )
            )
        except LocalEntryNotFoundError:
            if offline:
                raise
            return Path(hf_hub_download(repo_id, filename, revision=revision or None))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"the weights of {name} are not on this machine and the Hugging Face hub "
            f"{'is not asked here' if offline else 'cannot be reached'}; fetch them where there "
            f"is a network (`hf download {repo_id}`), or train an encoder with "
            "conditioning.pretrain"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"{filename} of {name} could not be fetched from {repo_id} ({type(error).__name__}); "
            "check the name, "
            "ask there for access and log in (`hf auth login`), and note that only safetensors "
            "are read"
        ) from error


def did_you_mean(architecture: str) -> str:
    """Half a sentence that helps with a name that timm does not know."""
    similar = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    return f"did you mean one of {similar}?" if similar else "see timm.list_models() for the names"

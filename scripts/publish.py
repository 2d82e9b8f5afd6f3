"""Publishes a ConstAttn checkpoint on the Hugging Face Hub, complete, so that anyone can load it.

    python scripts/publish.py runs/tiny me/tiny --dry-run
    python scripts/publish.py runs/tiny me/tiny --private --message "First version"
    python scripts/publish.py runs/tiny me/tiny --revision experiment

CHECKPOINT is a folder that train.py or `save_pretrained` wrote. Its folder hub/ becomes exactly what is sent: weights as
safetensors; the model's code and a config.json that names the class of every head, for those who have not installed
the package; generation_config.json; the tokenizer, where there is one; README.md, the model card (card.py), or the
checkpoint's own README.md if it has one. Only what has changed is sent. After a failure the same command goes on: what
the Hub has received it does not receive twice, and readers see the earlier version until all is there.

The token is that of `hf auth login` or HF_TOKEN.
"""

import argparse
import shutil
from pathlib import Path

import transformers
from card import make_card
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from lib.checkpoints import architecture, load_config, load_model, load_tokenizer, reason
from lib.staging import locked, staged


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder")
    parser.add_argument("repo_id", help="namespace/name on the Hub; made if it is not there")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, show what is in it, send nothing")
    parser.add_argument("--private", action="store_true", help="only the namespace's members see the repository")
    parser.add_argument("--revision", default="main", help="branch; made if it is not there (%(default)s)")
    parser.add_argument("--message", default="Publish the model", help="of the commit (%(default)s)")
    options = parser.parse_args(arguments)

    check_names(options.checkpoint, options.repo_id)
    api = HfApi()
    if not options.dry_run:
        check_token(api)
    with locked(options.checkpoint):
        folder = write_folder(options.checkpoint, options.repo_id)
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>16,} bytes  {file.name}")
    if options.dry_run:
        print(f"{folder} is what would be sent to {api.endpoint}/{options.repo_id} ({options.revision}); nothing was")
    else:
        send(api, folder, options.repo_id, options.private, options.revision, options.message)
    return folder


def check_names(checkpoint: Path, repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SystemExit(f"error: repository '{repo_id}': {error}") from error
    if "/" not in repo_id:
        raise SystemExit(
            f"error: repository '{repo_id}' has no namespace: write me/{repo_id}, me being you or your team"
        )
    if not checkpoint.is_dir():
        raise SystemExit(f"error: no such folder: '{checkpoint}'")
    model_type = load_config(checkpoint).model_type
    if model_type != "constattn":
        raise SystemExit(f"error: '{checkpoint}' is a model of type '{model_type}', not a ConstAttn checkpoint")


def check_token(api: HfApi) -> None:
    try:
        api.whoami()
    except LocalTokenNotFoundError as error:
        raise SystemExit("error: there is no token: call `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # a token that is refused, no network, HF_HUB_OFFLINE, …
        raise SystemExit(f"error: {api.endpoint} does not know who you are: {reason(error)}") from error


def write_folder(checkpoint: Path, repo_id: str) -> Path:
    """Makes CHECKPOINT/hub from what CHECKPOINT holds, and says what it leaves out."""
    tokenizer = load_tokenizer(str(checkpoint)) if any(checkpoint.glob("tokenizer*")) else None
    if tokenizer is None:
        print(f"'{checkpoint}' holds no tokenizer; it is published without one")
    auto_class, _ = architecture(load_config(checkpoint))
    model = load_model(str(checkpoint), tokenizer, getattr(transformers, auto_class))
    model.config.use_cache = True  # Trainer's intermediate checkpoints have it switched off
    with staged(checkpoint / "hub", whole=True) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        card = checkpoint / "README.md"
        if card.exists() and not is_generated(card):
            check_card(card)
            shutil.copyfile(card, folder / "README.md")
        else:
            make_card(checkpoint, checkpoint, repo_id).save(folder / "README.md")
    return checkpoint / "hub"


def is_generated(file: Path) -> bool:
    """Whether a checkpoint's README.md is as convert.py wrote it: the Hub's has its name."""
    return file.read_bytes() == str(make_card(file.parent, file.parent)).encode()


def check_card(file: Path) -> None:
    try:
        ModelCard.load(file)
    except Exception as error:  # not UTF-8, not YAML, metadata of the wrong form
        raise SystemExit(f"error: the metadata of '{file}' cannot be read: {reason(error)}") from error


def send(api: HfApi, folder: Path, repo_id: str, private: bool, revision: str, message: str) -> None:
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise SystemExit(
                f"error: {repo_id} exists and is public, so --private would not hold; nothing was sent. "
                "Make it private in its settings on the Hub, or name another repository"
            )
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            delete_patterns="model*.safetensors*",  # shards of an earlier version, where they are no longer
        )
    except Exception as error:  # the network, the Hub's answers, the metadata: each has its own
        cause = error.__cause__ if isinstance(error, RuntimeError) else None  # "Error while uploading …" says not why
        raise SystemExit(
            f"error: {repo_id} was not published: {reason(error)}{f' ({cause!r})' if cause else ''}\n"
            f"'{folder}' is complete; the same command sends what the Hub has not yet got"
        ) from error
    print(f"published: {commit.commit_url}")


if __name__ == "__main__":
    main()

"""Write a checkpoint as a Hugging Face folder: ``polyglu export CKPT DIR``.

    checkpoint ─► weights, config.json, generation_config.json     by transformers' own save
    modeling_polychromatic.py and what it imports of the package ─► files beside it, imports made relative
    tokenizer ─► tokenizer.json, tokenizer_config.json, chat_template.jinja
    run, results, figures ─► README.md

The folder is made in a hidden one beside it, and renamed. Its code needs torch and transformers, not this package.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from polyglu.data.tokenizer import Tokenizer
from polyglu.errors import PolygluError, run_command
from polyglu.export.card import model_card, read_run, read_scores
from polyglu.export.configuration_polychromatic import PolychromaticConfig
from polyglu.export.modeling_polychromatic import PolychromaticForCausalLM
from polyglu.files import check_writable, exclusive, flush, sha256, write_text
from polyglu.inference import open_tokenizer
from polyglu.logs import configure_logging
from polyglu.model.folder import CONFIG_FILE, read_description, weight_files, weights_digest
from polyglu.model.model import Checkpoint, check_shapes, describe_shape, read_checkpoint

CODE = ("export/configuration_polychromatic.py", "export/modeling_polychromatic.py", "export/layers_polychromatic.py",
        "export/cache_polychromatic.py", "model/layers.py", "model/activations.py")  # fmt: skip
"""Files of the package that an exported model runs; they import each other, torch and transformers alone."""
AUTO_MAP = {
    "AutoConfig": "configuration_polychromatic.PolychromaticConfig",
    "AutoModel": "modeling_polychromatic.PolychromaticModel",
    "AutoModelForCausalLM": "modeling_polychromatic.PolychromaticForCausalLM",
}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message.get('reasoning_content') -%}
{{ '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""
"""ChatML, as ``polyglu.data.chat.render_prompt`` writes it."""
WRITTEN = re.compile(
    r"(README\.md|figures|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map)\.json|chat_template"
    r"\.jinja|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|\w+\.py|__pycache__)"
)
"""Names in an exported folder."""


def export(
    source: Path,
    folder: Path,
    tokenizer: str | None = None,
    runs: Sequence[Path] = (),
    results: Sequence[Path] = (),
    figures: Path | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint as a Hugging Face folder; an earlier export there is replaced once the new one is whole.

    Args:
        source: portable ``.pt`` file, exported folder, or published layout.
        folder: to make.
        tokenizer: name or path; must be the one the checkpoint was trained with.
        runs: ``run_dir`` of the trainings that led to it, for the model card.
        results: evaluations of it, for the model card.
        figures: folder of PNG files, for the model card.
        max_shard_size: of a file of weights.

    Raises:
        PolygluError: the folder holds something else, another export to it is going on, or one of the inputs is not
            what it should be.
    """
    folder = folder.resolve()  # through a link to where it leads
    check_replaceable(folder)
    checkpoint = read_checkpoint(source)
    check_shapes(checkpoint.weights, checkpoint.config, source)
    text, digest = open_tokenizer(source, checkpoint, tokenizer), weights_digest(source)
    settings = [read_run(run, checkpoint) for run in runs]
    scores = [read_scores(file, digest) for file in results]
    pictures = sorted(figures.glob("*.png")) if figures else []
    if figures and not pictures:
        raise PolygluError(f"--figures {figures} has no .png files; give a folder that polyglu analyze has written.")
    identity = {"name": checkpoint.tokenizer.get("name", text.name), "fingerprint": text.fingerprint}
    with replacing(folder) as new:
        save_model(new, checkpoint, identity, text, max_shard_size)
        write_code(new)
        save_tokenizer(new, text, checkpoint.config.seq_length)
        for picture in pictures:
            (new / "figures").mkdir(exist_ok=True)
            shutil.copyfile(picture, new / "figures" / picture.name)
        hashes = {f"checkpoint {source.name}": digest} | {file.name: sha256(file) for file in weight_files(new)}
        names = [f"figures/{picture.name}" for picture in pictures]
        write_text(new / "README.md", model_card(folder.name, checkpoint, hashes, settings, scores, names))


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in which an export would destroy something else.

    Raises:
        PolygluError: it cannot be written, or holds what no export has written.
    """
    check_writable(folder.parent, "folder")
    if folder.exists() and not folder.is_dir():
        raise PolygluError(f"{folder} is a file; give the name of a new folder.")
    held = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not held:
        return
    if not (folder / CONFIG_FILE).is_file():
        raise PolygluError(f"{folder} is not empty and no export of this program; give the name of a new folder.")
    try:
        read_description(folder / CONFIG_FILE)
    except PolygluError:
        raise PolygluError(f"{folder} holds another model; give the name of a new folder.") from None
    if other := [name for name in held if not WRITTEN.fullmatch(name)]:
        raise PolygluError(f"{folder} holds '{other[0]}', which no export has written; move it, or give a new folder.")


def save_model(
    folder: Path, checkpoint: Checkpoint, identity: dict[str, str], tokenizer: Tokenizer, max_shard_size: str
) -> None:
    """Write weights, ``config.json`` and ``generation_config.json`` with transformers."""
    ends = [end for end in (tokenizer.eos_id, tokenizer.im_end_id) if end is not None]
    ids = {"eos_token_id": ends, "pad_token_id": tokenizer.eos_id}
    config = PolychromaticConfig(
        **describe_shape(checkpoint.config),
        **ids,
        tau=checkpoint.tau,
        step=checkpoint.step,
        tokenizer=identity,
        auto_map=AUTO_MAP,
        dtype="float32",
    )
    config.use_cache = config.decodes_with_cache
    model = PolychromaticForCausalLM(config)
    model.model.load_state_dict({name: weight.float() for name, weight in checkpoint.weights.items()})
    model.generation_config = GenerationConfig(**ids, do_sample=False, use_cache=config.use_cache)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for file in weight_files(folder):
        shutil.copymode(folder / CONFIG_FILE, file)  # safetensors lets nobody else read


def write_code(folder: Path) -> None:
    """Copy the modules that an exported model runs; their imports of one another become relative."""
    for name in CODE:
        text = files("polyglu").joinpath(name).read_text(encoding="utf-8")
        write_text(folder / Path(name).name, re.sub(r"^from polyglu\.\w+\.", "from .", text, flags=re.MULTILINE))


def save_tokenizer(folder: Path, tokenizer: Tokenizer, seq_length: int) -> None:
    """Write the tokenizer's files; with ChatML tokens, the chat template too."""
    tokenizer.save(folder)
    end = tokenizer.decode([tokenizer.eos_id])
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=end, pad_token=end, model_max_length=seq_length
    )
    if tokenizer.im_start_id is not None and tokenizer.im_end_id is not None:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    tokenizer.save(folder)  # as it is, not as transformers lays it out


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder; filled without an error, it is flushed and gets the name of ``folder``, whose export goes.

    Both lie meanwhile in a hidden folder beside it. What a killed export has left there is put back, or removed.
    """
    work = folder.with_name(f".{folder.name}.export")
    new, old = work / "new", work / "old"
    left = work.exists()  # else it is removed by what makes it
    with exclusive(work):
        try:
            _tidy(work, folder)
            new.mkdir()
            yield new
            for path in [*new.rglob("*"), new]:
                flush(path)
            check_replaceable(folder)  # still
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            flush(folder.parent)
        finally:
            _tidy(work, folder)
            if left:
                work.rmdir()


def _tidy(work: Path, folder: Path) -> None:
    """Empty the hidden folder; an earlier export in it goes back where there is no new one."""
    if (work / "old").exists() and not folder.exists():
        (work / "old").rename(folder)
    for path in (work / "new", work / "old"):
        shutil.rmtree(path, ignore_errors=True)


def main(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Portable .pt file, or published layout.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to make.")],
    tokenizer: Annotated[str | None, typer.Option(help="Name or path; default: the checkpoint's own.")] = None,
    run: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="run_dir of a training, for the model card; repeatable.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(metavar="FILE ...", help="Results of polyglu eval, for the model card.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder of polyglu analyze, for the model card.")] = None,
) -> None:
    """Write a checkpoint as a folder that transformers loads."""
    configure_logging()
    if more and not results:
        raise PolygluError(f"unexpected argument '{more[0]}'; give CKPT and DIR, and files after --results.")
    export(checkpoint, folder, tokenizer, run or [], [*(results or []), *(more or [])], figures)
    typer.echo(f"exported: {folder}", err=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))

"""The command passport.

Its options are the parameters of a function, which imports heavy modules inside.
"""

import shlex

from bitbyte.cli.options import Json, argument, refuse
from bitbyte.files import BitbyteError, RunError, artifacts, output, output_folder, shown


def passport(
    model: argument(str, "[MODEL]") = "",
    /,
    data: str = "",
    split: str = "val",
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    command: str | None = None,
    restore: str | None = None,
    timeout: float = 600.0,
    trained_on: str | None = None,
    claim: float | None = None,
    prefix: int | None = None,
    marginal: int | None = None,
    network: bool = False,
    trust_remote_code: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    threads: int | None = None,
    name: str | None = None,
    record: bool = True,
    out: str | None = None,
    card: str | None = None,
    allow_overwrite: bool = False,
    json: Json = False,
) -> dict:
    """Audit a model's bits per byte, whatever kind of model it is.

    The number is bits of the whole file over bytes of the file. Thirteen audits look for what makes
    such numbers wrong: another denominator, probabilities that do not sum to 1, a look at the
    future, padding, caches, dropout, and more. A number that fails an audit is not printed. Writes
    a record, and a page to look at or print. Exit code 1 if an audit fails.

    MODEL is a run or packed model; a folder of transformers (causal or masked, any tokenizer); a
    .gguf file; xz, zstd, brotli, ppmd, zpaq, gzip, bzip2, or none (the mixer); ngram or ngram:4,
    counted in --trained_on; uniform; or an object of yours with logprobs(ids), as file.py:name,
    whose code is run. Instead of MODEL, --command and --restore name a compressor.

    Args:
        model: what to audit.
        data: packed folder or its name, folder or glob of .bin, or one file.
        split: split of a packed folder.
        window: ids (bytes or tokens) per window; default: the model's context, 1024 at most for
            models that are not of bitbyte.
        stride: ids scored per window, the rest is context; default: the window.
        limit: score only the first so many bytes, which the page says.
        command: a compressor, as in "xz -9 -c"; {in} and {out} stand for files.
        restore: the command that restores, as in "xz -dc".
        timeout: seconds a command may take.
        trained_on: data that the model was trained on, to look for the scored bytes in; n-grams are
            counted in it.
        claim: bits per byte that somebody reports, which then must be the number measured.
        prefix: id before every window; default: the tokenizer's start token.
        marginal: also sum over other tokens for so many first bytes, and say what they would save;
            a forward for every byte and way to spell it, so some thousand bytes at most.
        network: let transformers fetch a MODEL that is a name on the Hub.
        trust_remote_code: run the code that a folder of transformers brings; read it first.
        batch_size: windows at a time.
        seed: of the audits' samples.
        device: auto, cpu, cuda, mps.
        threads: CPU threads.
        name: the model's name on the page and in tables.
        record: write a result record.
        out: folder of the record; default artifacts/results.
        card: HTML file to write; default: in artifacts/reports, under the record's name.
        allow_overwrite: replace the HTML file of --card if it exists.
    """
    from bitbyte.data.readers import find_data
    from bitbyte.device import choose_device, prepare_process
    from bitbyte.evaluate.records import write_record
    from bitbyte.files import write_atomic
    from bitbyte.passport import coders, issue
    from bitbyte.passport.cards import card as page
    from bitbyte.passport.find import open_subject

    if not data:
        raise BitbyteError("--data names the file, or the packed data, to score")
    if bool(model) == (command is not None):
        raise BitbyteError("name either a MODEL or a --command, and not both")
    if restore is not None and command is None:
        raise BitbyteError("--restore belongs to --command")
    if command is not None:
        refuse(
            "with a --command", prefix=prefix is not None, network=network,
            trust_remote_code=trust_remote_code, device=device != "cpu",
        )  # fmt: skip
    if name == "":
        raise BitbyteError("an empty name is not that of a model; drop --name")
    if not 0 <= seed < 2**63:
        raise BitbyteError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    target = None if card is None else output(card, overwrite=allow_overwrite)
    folder = output_folder(out) if record and out is not None else None
    prepare_process(threads, deterministic=False)
    source = find_data(data)
    known = None if trained_on is None else find_data(trained_on)
    if command is not None:
        subject = coders.by_command(command, restore, timeout)
    else:
        subject = open_subject(
            model, device=choose_device(device), trained_on=known, prefix=prefix,
            network=network, trust=trust_remote_code, threads=threads,
        )  # fmt: skip
    counted = getattr(subject, "source", "") == "ngram"  # knows its training data itself
    row = issue.passport(
        subject, source, split=split, window=window, stride=stride, limit=limit,
        batch_size=batch_size, claim=claim, known=None if counted else known, name=name,
        marginal=marginal, seed=seed, progress=True,
    )  # fmt: skip
    given = {
        "split": split if split != "val" else None, "window": window, "stride": stride,
        "limit": limit, "command": command, "restore": restore, "trained_on": trained_on,
        "claim": claim, "prefix": prefix, "marginal": marginal,
        "batch_size": batch_size, "seed": seed or None, "threads": threads,
        "device": device if device != "cpu" else None,
        "timeout": timeout if timeout != 600 else None,
    }  # fmt: skip
    words = [*([model] if model else []), "--data", data]
    for option, value in given.items():
        words += [] if value is None else [f"--{option}", str(value)]
    words += ["--network"] * network + ["--trust_remote_code"] * trust_remote_code
    row["call"] = shlex.join(["bitbyte", "passport", *words])
    print(described(row))
    path = write_record(row, folder) if record else None
    if path:
        print(shown(path))
    if target is None and path is not None:
        target = output_folder(artifacts("reports")) / f"{path.stem}.html"
    if target is not None:
        write_atomic(target, page(row).encode(), follow=card is not None)
        print(shown(target))
    document = row | {"record": path and str(path), "card": target and str(target)}
    if row["verdict"] != "pass":
        error = RunError(f"no bits per byte for {shown(row['model'])}: {row['why']}")
        error.document = document  # what --json prints
        raise error
    return document


def described(row: dict) -> str:
    """A passport in lines: the verdict, then every audit."""
    lines = [f"{shown(row['model'])}: no bits per byte; {row['why']}"]
    if row["bpb"] is not None:
        spread = "no interval"
        if row["interval"]:
            spread = "95 % interval of these bytes {:.4f} to {:.4f}".format(*row["interval"])
        lines = [
            f"{shown(row['model'])}: {row['bpb']:.4f} bits per byte ({spread}); "
            f"{row['bytes']:,} bytes; {row['why']}"
        ]
    marks = {"pass": "passed", "fail": "FAILED", "not possible": "-"}
    lines += [
        f"  {marks[a['verdict']]:7} {a['name']:12} {shown(a['text'])}" for a in row["audits"]
    ]  # fmt: skip
    if "tokenizations" in row["facts"]:
        lines.append(f"  note    {row['facts']['tokenizations']}")
    return "\n".join(lines)

# SPDX-License-Identifier: Apache-2.0
"""python -m undirected_vae train | evaluate | sample | info | compare | gap | estimator | toys

train and evaluate may be started by torchrun, in several processes that share the work.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import gibbs_ext as gx

from . import estimator
from .config import EVALUATION, MAX_SEED, PRESETS, Config, ConfigError, add_flags, checked, resolve
from .data import SPLITS, DataError, Dataset, load
from .processes import agreed, find_device, processes, require_shares
from .runs import Diverged, Run, RunError, blaming, new_folder


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m undirected_vae", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train, then evaluate on the test images and draw pictures")
    where = train.add_mutually_exclusive_group()
    where.add_argument(
        "--run",
        "--folder",  # torchrun's parser takes --run for its own --run-path
        type=Path,
        help="folder of the new run (default: runs/ and a name made from the settings)",
    )
    where.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue the run in this folder; flags (for example a larger --steps) change its settings",
    )
    train.add_argument("--preset", choices=PRESETS, help="settings to start from (default: default)")
    train.add_argument(
        "--config", type=Path, metavar="FILE", help="settings from a .toml or .yaml file, which flags override"
    )
    train.add_argument(
        "--evaluate", action=argparse.BooleanOptionalAction, default=True, help="evaluate and sample at the end"
    )
    add_device(train)
    train.add_argument(
        "--capture",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, capture the training step in a CUDA graph (not with several processes)",
    )
    train.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="on the CPU, try torch.compile and keep it if steps are faster, which changes their rounding",
    )
    add_flags(train)

    evaluate = commands.add_parser(
        "evaluate",
        help="estimate the test log-likelihood: importance-weighted bound, log Z by AIS",
        description="The result is saved with the run; an evaluation of more images of the same checkpoint is kept.",
    )
    evaluate.add_argument("path", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="RUN",
        help="also print the paired difference to this run on the same images; its saved evaluation is not replaced",
    )
    evaluate.add_argument("--split", choices=SPLITS, default="test")
    add_device(evaluate)
    add_flags(evaluate, EVALUATION)

    sample = commands.add_parser("sample", help="draw samples.png, reconstructions.png and curves.png")
    sample.add_argument("path", type=Path, metavar="RUN")
    sample.add_argument("--count", type=int, default=100, help="images to generate (default: 100)")
    sample.add_argument("--seed", type=int, default=0)
    add_device(sample)

    info = commands.add_parser(
        "info", help="print a run's settings, size and results; without a run, the build and the presets"
    )
    info.add_argument("path", type=Path, metavar="RUN", nargs="?")

    compare = commands.add_parser(
        "compare",
        help="train and evaluate a grid of settings and seeds, with one table and one plot",
        description="Cells run in parallel, each in a process of one thread. Stopped or killed, it goes on when it is "
        "started again. Flags of settings are those of all cells.",
    )
    compare.add_argument("grid", metavar="GRID", help="a .toml or .yaml file, or the name of a grid of the package")
    compare.add_argument("--folder", type=Path, help="folder of the runs and tables (default: runs/ and the grid)")
    compare.add_argument("--processes", type=int, help="cells at a time (default: the number of processors)")
    compare.add_argument("--baseline", metavar="ROW", help="row to which the others are compared (default: the grid's)")
    compare.add_argument("--retry", action="store_true", help="train cells anew that have diverged")
    compare.add_argument("--tables-only", action="store_true", help="train nothing; write the tables of what is done")
    add_flags(compare)

    gap = commands.add_parser(
        "gap",
        help="split the KL of a run's posterior into amortisation and family, by fits to single images",
        description="The result is saved with the run.",
    )
    gap.add_argument("path", type=Path, metavar="RUN")
    gap.add_argument("--images", type=int, default=20, help="images, evenly spaced in the split (default: 20)")
    gap.add_argument("--steps", type=int, default=1000, help="steps of each fit (default: 1000)")
    gap.add_argument("--samples", type=int, default=128, help="samples of each image and step (default: 128)")
    gap.add_argument("--seed", type=int, default=0)
    gap.add_argument("--split", choices=SPLITS, default="test")
    add_device(gap)

    estimator.add_flags(
        commands.add_parser("estimator", help="bias and noise of the gradient through relaxed sweeps, by enumeration")
    )

    toys = commands.add_parser(
        "toys",
        help="train posteriors of small models whose exact posteriors are known; one table and one plot",
        description="Prints the table of exact KL divergences, and writes toys.md, toys.csv and toys.png.",
    )
    toys.add_argument("--folder", type=Path, default=Path("runs/toys"), help="(default: %(default)s)")
    toys.add_argument("--toys", nargs="+", metavar="TOY", help="xor, noisy_or, linear, mlp (default: all)")
    toys.add_argument("--seeds", type=int, default=3, help="trainings of each kind, from seed 0 (default: 3)")
    toys.add_argument("--steps", type=int, default=600, help="steps of each training (default: 600)")
    toys.add_argument("--processes", type=int, default=2, help="trainings at a time (default: 2)")
    return top


def add_device(command: argparse.ArgumentParser) -> None:
    # The device is no setting: a run that was made on one device can continue on another.
    command.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:i (default: auto)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    command = arguments.pop("command")
    run: dict[str, Callable[..., None]] = {
        "train": _train,
        "evaluate": _evaluate,
        "sample": _sample,
        "gap": _gap,
    }
    try:
        if command == "info":
            _info(arguments)
        elif command == "compare":
            return _compare(arguments)
        elif command == "estimator":
            estimator.run(arguments)
        elif command == "toys":
            _toys(arguments)
        else:
            device = find_device(arguments.pop("device"))
            with processes(device):
                run[command](arguments, device)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return 3  # so that `compare` can tell it from other errors
    except (ConfigError, DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        hint = "pip install --no-build-isolation '.[train]' in the source folder installs all that is needed"
        print(f"error: the package {error.name} is not installed; {hint}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _train(arguments: dict[str, Any], device: torch.device) -> None:
    from .evaluate import evaluate_run, summary
    from .sample import sample_run
    from .train import Interrupted, train

    path, resume, preset, file, finish, capture, compile_model = (
        arguments.pop(name) for name in ("run", "resume", "preset", "config", "evaluate", "capture", "compile")
    )
    if compile_model and (device.type == "cuda" or gx.distributed.world_size() > 1):
        raise ConfigError("compile: expected a run on the CPU in one process (on a GPU the step is captured)")
    # If there are several processes, the first one writes to the folder and prints.
    is_first = gx.distributed.rank() == 0
    if resume:
        before = Run.open(resume).config
        run = Run(resume, resolve(preset, file, arguments, base=before))
        # The persistent chains of the run belong to its images.
        _require_same_images(before, run.config, "a run cannot be resumed on other images")
        data = run.load_data()
        _require_work(run.config, data, finish)
    else:
        config = resolve(preset, file, arguments)
        data = load(config.data, config.data_seed)
        _require_work(config, data, finish)
        folder = path or (new_folder(Path("runs") / _folder(config)) if is_first else None)
        run = Run(agreed(folder), config)
    with run.lock() if is_first else nullcontext():
        if is_first:
            if not resume:
                run.create()
            print(_headline(run, data, device), file=sys.stderr)
        try:
            model = train(run, data, bool(resume), device, capture=capture, compile_model=compile_model)
        except Interrupted:
            if is_first:
                note = f"interrupted; the checkpoint is saved, continue with: train --resume {run.path}"
                print(note, file=sys.stderr)
            raise KeyboardInterrupt from None
        if finish:
            # The settings of the run are those of its evaluation, also if they were changed to fewer images.
            result = evaluate_run(run, data, model, keep_larger=False)
            if is_first:
                print(summary(result))
                for picture in sample_run(run, data, model):
                    print(picture)


def _require_work(config: Config, data: Dataset, evaluates: bool) -> None:
    """Raises ConfigError, before a folder is made, if images or chains do not suffice for a batch and all processes."""
    if len(data.train) < config.batch_size:
        raise ConfigError(
            f"batch_size: expected at most the {len(data.train)} training images, got {config.batch_size}"
        )
    require_shares(config, "batch_size", "prior_chains", *(["prior_ais_chains"] if evaluates else []))


def _headline(run: Run, data: Dataset, device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    if gx.distributed.world_size() > 1:
        where = f"{gx.distributed.world_size()} processes, each on {where}"
    images = f"{len(data.train)} training images of {data.name}"
    return f"{run.path}: {images}, {run.config.steps} steps, on {where}"


def _folder(config: Config) -> str:
    kind = config.posterior if config.posterior == "directed" else f"{config.posterior}-{config.coupling}"
    if not config.has_chimera:
        return f"{kind}-{config.left}x{config.right}"
    return f"{kind}-{config.prior}-{config.chimera_rows}x{config.chimera_cols}x{config.chimera_shore}"


def _require_same_images(first: Config, second: Config, problem: str) -> None:
    images = [f"data {config.data}, data_seed {config.data_seed}" for config in (first, second)]
    if images[0] != images[1]:
        raise RunError(f"{problem}: {images[0]}; {images[1]}")


def _evaluate(arguments: dict[str, Any], device: torch.device) -> None:
    from .evaluate import compare, evaluate_run, saved, settings, summary

    path, against, split = (arguments.pop(name) for name in ("path", "against", "split"))
    run = Run.open(path)
    run.config = run.config.replace(arguments)
    if against:
        other = Run.open(against)
        other.config = other.config.replace({name: getattr(run.config, name) for name in EVALUATION})
        _require_same_images(run.config, other.config, "runs are compared on the same images only")
        other_result = saved(other, split, other.load_checkpoint()["step"])
    result = evaluate_run(run, run.load_data(), split=split, device=device)
    _say(f"{run.path}: {summary(result)}")
    if against:
        if not other_result or other_result["settings"] != settings(other.config):
            other_result = evaluate_run(other, other.load_data(), split=split, replace=False, device=device)
        _say(f"{other.path}: {summary(other_result)}")
        paired = compare(result, other_result)
        difference = f"{paired['difference']:+.2f} +- {paired['standard_error']:.2f} ({paired['images']} images)"
        _say(f"NLL of {run.path} minus {other.path}, paired: {difference}")
        if paired["looseness"] > abs(paired["difference"]) / 10:
            size = f"{paired['looseness']:.3f}" if math.isfinite(paired["looseness"]) else "which was not measured"
            _say(
                f"That is less than ten times the looseness of a bound, {size}: see --max-looseness and --check-images"
            )
        if not math.isnan(paired["change"]):
            change = f"{paired['change']:+.3f} +- {paired['change_standard_error']:.3f}"
            _say(f"Ten times the samples would change that by {change}")


def _compare(arguments: dict[str, Any]) -> int:
    from . import compare

    name, folder, num_processes, baseline, retry, tables_only = (
        arguments.pop(name) for name in ("grid", "folder", "processes", "baseline", "retry", "tables_only")
    )
    path = compare.find_grid(name)
    folder = folder or Path("runs") / path.stem
    num_processes = os.cpu_count() or 1 if num_processes is None else num_processes
    checked("processes", num_processes, int, 1, 1000)
    grid = compare.read_grid(path, folder, arguments, baseline)
    with compare.locked(folder):
        num_failed = 0 if tables_only else compare.compare(grid, folder, num_processes, retry)
        written = compare.write_tables(grid, folder)
    print(compare.markdown(grid), end="")
    for file in written:
        print(file)
    return 1 if num_failed else 0


def _toys(arguments: dict[str, Any]) -> None:
    from . import toys

    folder, names = arguments["folder"], arguments["toys"] or list(toys.TOYS)
    unknown = [name for name in names if name not in toys.TOYS]
    if unknown:
        raise ConfigError(f"toys: expected some of {', '.join(toys.TOYS)}, got {', '.join(unknown)}")
    seeds = checked("seeds", arguments["seeds"], int, 2, 1000)  # one seed has no standard error
    steps = checked("steps", arguments["steps"], int, 1, 10**9)
    num_processes = checked("processes", arguments["processes"], int, 1, 1000)
    with blaming(folder, "the folder cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
    results = toys.run(list(dict.fromkeys(names)), seeds, steps, num_processes)
    print(toys.markdown(results), end="")  # first, because writing may fail
    for file in toys.write(results, folder):
        print(file)


def _say(text: str) -> None:
    if gx.distributed.rank() == 0:
        print(text)


def _sample(arguments: dict[str, Any], device: torch.device) -> None:
    from .sample import sample_run

    count = checked("count", arguments["count"], int, 1, 10_000)
    seed = checked("seed", arguments["seed"], int, 0, MAX_SEED)
    run = Run.open(arguments["path"])
    if gx.distributed.rank() > 0:
        return
    for picture in sample_run(run, run.load_data(), count=count, seed=seed, device=device):
        print(picture)


def _gap(arguments: dict[str, Any], device: torch.device) -> None:
    from .gap import gap_run, table

    limits = {"images": (1, 10**6), "steps": (1, 10**7), "samples": (2, 10**6), "seed": (0, MAX_SEED)}
    images, steps, samples, seed = (checked(name, arguments[name], int, *limit) for name, limit in limits.items())
    run = Run.open(arguments["path"])
    if gx.distributed.rank() > 0:
        return
    result = gap_run(
        run,
        run.load_data(),
        split=arguments["split"],
        num_images=images,
        steps=steps,
        num_samples=samples,
        seed=seed,
        device=device,
    )
    print(table(result))


def _info(arguments: dict[str, Any]) -> None:
    import yaml

    from .evaluate import read, summary
    from .vae import VAE

    if arguments["path"] is None:
        print(yaml.safe_dump({"build": gx.build_info(), "presets": list(PRESETS)}, sort_keys=False), end="")
        return
    run = Run.open(arguments["path"])
    state = run.load_checkpoint()
    with run.fitting():
        model = VAE(run.config, state["model"]["encoder.mean"], 1)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        yaml.safe_dump(
            {"run": str(run.path), "step": state["step"], "parameters": parameters, "settings": run.config.to_dict()},
            sort_keys=False,
        ),
        end="",
    )
    result = read(run)
    if result:
        step = result.get("step", "unknown")
        print(f"result: {summary(result)}" + (f", evaluated at step {step}" if step != state["step"] else ""))


if __name__ == "__main__":
    sys.exit(main())

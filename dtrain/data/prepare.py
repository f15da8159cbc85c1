"""`dtrain prepare`: raw exports in, catalogues, training shards, valid and test sets and one manifest out.

One pass scatters rows into buckets by user; then each bucket is tidied, surveyed and written on its own, with only the
catalogue in memory beside it. The bucket functions are pure, so `run` may be any map, a cluster's among them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from dtrain.core.config import to_dict
from dtrain.core.errors import DataError
from dtrain.core.fingerprint import fingerprint
from dtrain.data.build import Job, build_platform
from dtrain.data.manifest import SCHEMA_VERSION, Manifest
from dtrain.data.output import open_output
from dtrain.data.platforms import PlatformConfig, PrepareConfig, SourceConfig
from dtrain.data.progress import Progress
from dtrain.data.pseudonym import UserKey
from dtrain.data.sources import SourceFile, find_files
from dtrain.data.workers import RunMap, Workers

__all__ = ["PrepareReport", "prepare"]

#: Counts up whenever the same inputs would give other bytes than before.
_CODE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareReport:
    """What a preparation did."""

    manifest: Manifest
    built: tuple[str, ...]  # platforms made now; the others were there already
    changed: bool  # False: the folder is as it was
    seconds: float

    def table(self) -> str:
        """A line a platform, then the rows dropped by reason, for people."""
        head = ("platform", "users", "items", "train rows", "samples", "cold test", "fingerprint", "dropped rows")
        rows, reasons = [head], []
        for p in self.manifest.platforms.values():
            numbers = (p.users, p.items, p.train_rows, p.train_samples)
            users, items, train_rows, samples = (f"{n:,}" for n in numbers)
            dropped = f"{sum(p.rejected.values()):,}"
            cold = f"{p.cold_share:.2%}"
            rows.append((p.name, users, items, train_rows, samples, cold, p.split_fingerprint, dropped))
            if p.dated_items:
                reasons.append(f"{p.name}: a release date is known of {p.dated_items:,} of {p.items:,} items")
            if p.rejected:
                listed = ", ".join(f"{n:,} {reason}" for reason, n in sorted(p.rejected.items(), key=lambda r: -r[1]))
                reasons.append(f"{p.name} dropped {listed}")
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        align = [str.ljust, *[str.rjust] * (len(head) - 1)]
        lines = ["  ".join(a(c, w) for a, c, w in zip(align, row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, *reasons])

    def summary(self) -> str:
        """One sentence: what changed and where it is."""
        where = self.manifest.root
        if not self.changed:
            return f"{where}: unchanged; all {len(self.manifest.platforms)} platforms are as these inputs give them"
        return f"{where}: prepared {', '.join(self.built) or 'nothing new'} in {self.seconds:.1f} s"


def prepare(config: PrepareConfig, *, progress: bool | None = None, run: RunMap | None = None) -> PrepareReport:
    """Prepare every platform of `config` into `config.out`, whose previous content stands until all are whole.

    `progress`: bars on stderr (None: only on a terminal). `run(function, tasks)` maps the per-bucket work; by default
    `config.workers` processes do, and a script that calls this needs its `if __name__ == "__main__"`.
    Raises ConfigError and DataError; whatever ends it, the folder is as before or as asked for, never between.
    """
    started = time.monotonic()
    key, bars = UserKey.load(config.privacy), Progress(progress)
    found = {name: _find(platform) for name, platform in config.platforms.items()}
    with open_output(config.out) as output, Workers(config.workers) as workers:
        done, built = {}, []
        for name, platform in config.platforms.items():
            catalog, interactions = found[name]
            job = Job(
                name=name,
                config=platform,
                catalog=catalog,
                interactions=interactions,
                build=_build_id(config, name, catalog, interactions, key, bars),
                key=key.for_platform(name, config.privacy.scope),
                window=config.window,
                overlap=config.overlap,
                progress=bars,
                run=run or workers,
            )
            ready = output.reusable(name, job.build)
            if ready is None:
                built.append(name)
                try:
                    folder = output.begin(name)
                    ready = build_platform(job, folder.absolute())  # a worker may have another working directory
                    output.finish(folder, ready)
                except DataError as error:
                    raise type(error)(f"platform {name!r}: {error}") from error.__cause__
            done[name] = ready
        manifest, changed = output.commit(done)
    seconds = time.monotonic() - started
    return PrepareReport(manifest=manifest, built=tuple(built), changed=changed, seconds=seconds)


def _find(platform: PlatformConfig) -> tuple[list[list[SourceFile]], list[list[SourceFile]]]:
    def files(sources: Sequence[SourceConfig]) -> list[list[SourceFile]]:
        return [find_files(source.files) for source in sources]

    return files(platform.catalog.sources), files(platform.interactions)


def _build_id(
    config: PrepareConfig,
    name: str,
    catalog: list[list[SourceFile]],
    interactions: list[list[SourceFile]],
    key: UserKey,
    bars: Progress,
) -> str:
    """A fingerprint of everything the bytes of a build depend on; files count by content, not by where they lie."""
    block = to_dict(config.platforms[name])
    if block["train_users"] == 1:
        del block["train_users"]  # builds from before there was such a key stay what they are
    groups = [*zip(block["catalog"]["sources"], catalog), *zip(block["interactions"], interactions)]
    with bars.reading(f"{name}: checking", (file for _, files in groups for file in files)) as on_bytes:
        for source, files in groups:
            source["files"] = [[PurePosixPath(file.path).suffix, file.sha256(on_bytes)] for file in files]
    return fingerprint(
        {
            "platform": [name, block],
            "window": [config.window, config.overlap],
            "privacy": [key.key_id, config.privacy.scope],
            "versions": [SCHEMA_VERSION, _CODE_VERSION],
        }
    )

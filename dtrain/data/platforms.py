"""The config of `dtrain prepare`: what a platform is, as data. See docs/data.md for every key with examples."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from dtrain.core.cluster import ClusterConfig
from dtrain.core.config import nearest
from dtrain.core.errors import ConfigError

__all__ = [
    "FILTER_OPS",
    "READER_NAMES",
    "CatalogConfig",
    "ColumnsConfig",
    "FilterConfig",
    "PlatformConfig",
    "PrepareConfig",
    "PrivacyConfig",
    "SourceConfig",
    "SplitConfig",
]

READER_NAMES = ("csv", "json", "jsonl", "parquet", "recbole")
FILTER_OPS = ("eq", "ge", "gt", "in", "le", "lt", "matches", "ne", "not_in", "not_null")


def _one_of(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{where}: {value!r} must be one of {', '.join(known)}.{nearest(value, known)}")


def _time_format(where: str, value: str) -> None:
    if "%" not in value:
        _one_of(where, value, ("iso", "seconds", "milliseconds"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """Files of one shape. `.gz` and `.zip` are unpacked while reading."""

    files: list[str]  # paths or URLs that fsspec opens; globs allowed, their matches read in sorted order
    reader: str = "csv"  # csv | json | jsonl | parquet | recbole
    separator: str = ","  # csv: one character between fields
    quote: str = '"'  # csv: one character around fields, or "" for none
    column_names: list[str] = field(default_factory=list)  # csv without a header row: its columns, in order
    encoding: str = "utf-8"  # csv, json, jsonl, recbole: how the bytes are text
    member: str = ""  # zip: the file inside, where there are several
    history: list[str] = field(
        default_factory=list
    )  # columns that together hold a user's ordered items, one row a user
    history_separator: str = " "  # between the items of a history column that is text

    def check(self, where: str) -> None:
        if not self.files:
            raise ConfigError(f"{where}.files: is empty; name at least one file")
        _one_of(f"{where}.reader", self.reader, READER_NAMES)
        for name, value, least in (("separator", self.separator, 1), ("quote", self.quote, 0)):
            if not least <= len(value.encode()) <= 1:
                raise ConfigError(f"{where}.{name}: {value!r} must be one ASCII character")
        if self.history and not self.history_separator:
            raise ConfigError(f"{where}.history_separator: is empty; give the text between two items")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnsConfig:
    """Which column of the interaction files holds what. Empty: the platform has no such thing."""

    user: str
    item: str
    time: str = ""
    event: str = ""  # its values are the keys of `event_weights`
    value: str = ""  # a number, such as a rating or quantity; see `weight_by_value`
    time_format: str = "iso"  # iso | seconds | milliseconds (since 1970, UTC) | a strptime format such as "%d/%m/%Y"
    user_type: str = "text"  # text | integer: an integer id loses a trailing ".0"
    item_type: str = "text"  # the same for items, also in the catalogue

    def check(self, where: str) -> None:
        _one_of(f"{where}.user_type", self.user_type, ("text", "integer"))
        _one_of(f"{where}.item_type", self.item_type, ("text", "integer"))
        _time_format(f"{where}.time_format", self.time_format)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Keeps the rows for which `column op value` holds; the others are counted as `filter:NAME`.

    A missing cell passes only `ne` and `not_in`. A number as `value` compares as numbers, anything else as text.
    """

    column: str
    op: str  # eq | ne | gt | ge | lt | le | in | not_in | matches (a regular expression, anywhere) | not_null
    value: Any = None  # a list for in and not_in; nothing for not_null
    name: str = ""  # default: "COLUMN OP"

    @property
    def label(self) -> str:
        return "filter:" + (self.name or f"{self.column} {self.op}")

    def check(self, where: str) -> None:
        _one_of(f"{where}.op", self.op, FILTER_OPS)
        is_list = isinstance(self.value, list)
        if self.op == "not_null":
            valid = self.value is None
        elif self.op in ("in", "not_in"):
            valid = is_list and len(self.value) > 0
        elif self.op in ("gt", "ge", "lt", "le"):
            valid = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        elif self.op == "matches":
            valid = isinstance(self.value, str) and self.value != ""
        else:
            valid = self.value is not None and not is_list
        if not valid:
            kind = {"not_null": "absent", "in": "a list", "not_in": "a list", "matches": "a regular expression"}
            default = "one value" if self.op in ("eq", "ne") else "a number"
            raise ConfigError(f"{where}.value: {self.value!r} must be {kind.get(self.op, default)} for op {self.op}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogConfig:
    """Where the text of an item comes from.

    `text` is a template of words: `{title} {genres}`. `{a|b}` takes `b` where `a` is empty; lists are joined by
    spaces; a word whose fields are all empty is left out; an item without any text is left out.
    """

    id: str  # column of the item id
    text: str
    sources: list[SourceConfig] = field(default_factory=list)  # none: the interaction rows that count
    category: str = ""  # a template like `text`
    released: str = ""  # column of the date from which the item is to be had, the earliest of its rows; see `arrivals`
    released_format: str = "iso"  # as columns.time_format; a cell that isn't of it counts as a date that nobody knows
    filters: list[FilterConfig] = field(default_factory=list)
    pick: str = "first"  # first | most_frequent (ties: the text that sorts first): which of an item's rows counts

    def check(self, where: str) -> None:
        _one_of(f"{where}.pick", self.pick, ("first", "most_frequent"))
        _time_format(f"{where}.released_format", self.released_format)
        for index, source in enumerate(self.sources):
            source.check(f"{where}.sources[{index}]")
        for index, rule in enumerate(self.filters):
            rule.check(f"{where}.filters[{index}]")
        for name, template in (("text", self.text), ("category", self.category)):
            fields = re.findall(r"\{([^{}]*)\}", template)
            if re.sub(r"\{[^{}]*\}", "", template).strip("{}") != re.sub(r"\{[^{}]*\}", "", template) or any(
                not part for names in fields for part in names.split("|")
            ):
                raise ConfigError(f"{where}.{name}: {template!r} has an unmatched brace or an empty field name")
            if not fields and (name == "text" or template):
                raise ConfigError(f"{where}.{name}: {template!r} names no field; write fields as {{column}}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig:
    """How a platform's rows become train, valid and test."""

    protocol: str = "leave_last_out"  # leave_last_out | by_time
    test_share: float = (
        0.1  # by_time: about this share of rows is test, the newest; the cut is the nearest UTC midnight
    )
    valid_share: float = 0.1  # by_time: about this share of rows is valid, just before the test period

    def check(self, where: str) -> None:
        _one_of(f"{where}.protocol", self.protocol, ("leave_last_out", "by_time"))
        if not (0 < self.test_share < 1 and 0 < self.valid_share < 1 and self.test_share + self.valid_share < 1):
            raise ConfigError(
                f"{where}: test_share={self.test_share} and valid_share={self.valid_share} must be above 0 "
                "and together below 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformConfig:
    """One storefront or market."""

    interactions: list[SourceConfig]
    columns: ColumnsConfig
    catalog: CatalogConfig
    language: str  # BCP 47 tag of the item texts, such as en or zh
    filters: list[FilterConfig] = field(default_factory=list)
    event_weights: dict[str, float] = field(default_factory=dict)  # event name -> weight of its rows as targets
    other_event_weight: float = 1.0  # weight of rows with another event or none; 0 makes them context only
    weight_by_value: bool = False  # multiply a row's weight by its value, which must then be 0 or more
    min_users_per_item: int = 1  # items met by fewer distinct users are dropped
    min_items_per_user: int = 3  # users with fewer distinct items are dropped
    train_users: float = 1.0  # share of the users whose rows train, a fixed sample; valid and test have all of them
    split: SplitConfig = field(default_factory=SplitConfig)
    on_bad_row: str = "error"  # error | drop: what a malformed row does; dropped rows are counted

    def check(self, where: str) -> None:
        if not self.interactions:
            raise ConfigError(f"{where}.interactions: is empty; name at least one source")
        for index, source in enumerate(self.interactions):
            source.check(f"{where}.interactions[{index}]")
            if source.history and self.columns.time:
                raise ConfigError(
                    f"{where}.columns.time: {self.columns.time!r} can't be used with interactions[{index}].history, "
                    "which has order only; leave it empty"
                )
        for index, rule in enumerate(self.filters):
            rule.check(f"{where}.filters[{index}]")
        self.columns.check(f"{where}.columns")
        self.catalog.check(f"{where}.catalog")
        self.split.check(f"{where}.split")
        _one_of(f"{where}.on_bad_row", self.on_bad_row, ("error", "drop"))
        if self.min_users_per_item < 1 or self.min_items_per_user < 3:
            raise ConfigError(f"{where}: min_users_per_item must be at least 1, min_items_per_user at least 3")
        if not 0 < self.train_users <= 1:
            raise ConfigError(f"{where}.train_users: {self.train_users} must be above 0 and at most 1")
        if bool(self.columns.event) != bool(self.event_weights) or len(self.event_weights) > 100:
            raise ConfigError(f"{where}: columns.event and event_weights (at most 100) are set together or not at all")
        if min([self.other_event_weight, *self.event_weights.values()]) < 0:
            raise ConfigError(f"{where}: event weights must be 0 or more")
        if self.weight_by_value and not self.columns.value:
            raise ConfigError(f"{where}.weight_by_value: needs columns.value")
        if self.split.protocol == "by_time" and not self.columns.time:
            raise ConfigError(f"{where}.split.protocol: by_time needs columns.time; use leave_last_out without times")

    @property
    def events(self) -> tuple[str, ...]:
        """Names of the event types, in the order that samples number them."""
        return (*self.event_weights, "other") if self.event_weights else ("interaction",)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyConfig:
    """User ids leave preparation only as HMAC-SHA256 under a secret key: from DTRAIN_USER_KEY (hex), else a file."""

    key_file: str = "~/.config/dtrain/user.key"  # made with mode 0600 on first use
    scope: str = "company"  # company: a user's hash is the same on all platforms | platform: it is not

    def check(self, where: str) -> None:
        _one_of(f"{where}.scope", self.scope, ("company", "platform"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareConfig:
    """Everything `dtrain prepare` needs. Platforms keep their order in the manifest."""

    out: str  # folder for the prepared data
    platforms: dict[str, PlatformConfig]
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    window: int = 50  # items of a training sample at most
    overlap: int = 10  # leading items that a later window repeats as context from the one before
    workers: int = 0  # processes; 0: one a core
    cluster: ClusterConfig = field(
        default_factory=ClusterConfig
    )  # with an address: its nodes instead of processes here

    def __post_init__(self) -> None:
        if not self.platforms:
            raise ConfigError("platforms: is empty; describe at least one platform")
        if "://" in self.out:
            raise ConfigError(
                f"out={self.out.partition('://')[0]}://...: data is prepared into a folder; give one, and copy it from "
                "there, manifest.json last, with any tool of the storage, such as `aws s3 cp --recursive`"
            )
        for name, platform in self.platforms.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ConfigError(f"platforms.{name}: a name is made of letters, digits, _ and -; rename the platform")
            platform.check(f"platforms.{name}")
        self.privacy.check("privacy")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers}: must be 0 (one process a core) or more")
        if not 1 <= self.overlap < self.window <= 4096:
            raise ConfigError(f"window={self.window}, overlap={self.overlap}: need 1 <= overlap < window <= 4096")

"""Fixtures that more than one test module uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from dtrain.checkpoint.store import CheckpointStore
from dtrain.cli.main import main
from dtrain.data.pseudonym import KEY_VARIABLE
from tests.blob_toys import PART
from tests.prepare_toys import KEY
from tests.store_toys import ALL, fill, store_in

if TYPE_CHECKING:
    from tests.s3_server import S3Server

Cli = Callable[..., tuple[int, str]]  # see `cli`

WORDS = (
    "red green blue small large soft hard round square old new garden kitchen toy game lamp chair mug clock box film "
    "drama comedy action bread milk cheese apple pear tea coffee water paper pen book shoe hat coat bag ring watch"
).split()


#: Modules that take minutes, the longest first: begun last, one of them would run alone at the end.
LONG = "test_ray test_faults test_stop test_train test_elastic test_equivalence test_hosts test_train_bad_input".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules are dealt to processes in this order."""
    items.sort(key=lambda item: LONG.index(name) if (name := item.path.stem) in LONG else len(LONG))


def make_tiny_encoder(folder: Path) -> Path:
    """A Hugging Face folder with a random two-layer BERT (hidden 32), its WordPiece vocabulary WORDS and letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters), *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_encoder`."""
    return make_tiny_encoder(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture
def user_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment has the key of user ids."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="session")
def shops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder of two small shops, for tests that leave it as it is."""
    from tests.train_toys import write_shops  # it imports this module's WORDS

    return write_shops(tmp_path_factory.mktemp("shops"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """The config of a run trained on those shops, beside its folder `run`, for tests that leave it as it is."""
    from tests.transfer_toys import trained

    return trained(tmp_path_factory.mktemp("base"), shops, tiny_encoder)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of platforms that this run never saw, for tests that leave it as it is."""
    from tests.transfer_toys import elsewhere

    return elsewhere(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shops: Path, tiny_encoder: Path) -> Path:
    """The run that those on clusters are compared with; see `tests.ray_runs`."""
    from tests.ray_runs import unbroken_run

    return unbroken_run(tmp_path_factory.mktemp("unbroken"), shops, tiny_encoder)


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    from tests.s3_server import s3_server  # slow to load

    with s3_server() as server:
        yield server


@pytest.fixture
def server(running_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, without faults and with an empty bucket; small parts, and no waiting between attempts."""
    for name, value in running_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in {"PART": PART, "RANGE": PART // 2, "CONFLICT_S": 0}.items():
        monkeypatch.setattr(f"dtrain.core.object_blobs.{name}", value)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", PART)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    running_server.requests.clear()
    yield running_server
    running_server.faults.clear()
    running_server.ignore = ()
    for key in running_server.objects():
        running_server.client.delete_object(Bucket=running_server.bucket, Key=key)
    for key, upload in running_server.uploads():
        running_server.client.abort_multipart_upload(Bucket=running_server.bucket, Key=key, UploadId=upload)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where `store` keeps its checkpoints."""
    return tmp_path / "checkpoints"


@pytest.fixture
def store(root: Path) -> CheckpointStore:
    return store_in(root)


@pytest.fixture
def filled(root: Path) -> None:
    """The store in `root` has checkpoints, see `fill`."""
    fill(store_in(root, config=ALL))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`dtrain checkpoint ARGUMENTS`: exit code and everything it printed."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["checkpoint", *map(str, arguments)])
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Any:
    """The `Case` of tests.eval_cases over the folder of tests.eval_toys."""
    from tests.eval_cases import open_case  # these import from here
    from tests.eval_toys import prepared

    root = tmp_path_factory.mktemp("data")
    prepared(root)
    return open_case(root, tiny_encoder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Toys are slower on two, and other tests keep what they had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

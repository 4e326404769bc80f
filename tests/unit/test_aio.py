"""The engines: every request ends once, with the data where it belongs or an error, whatever is asked of them at once."""

from __future__ import annotations

import errno
import os
import random
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stratovirt.backends import aio, aio_kernel, aio_native, aio_uring
from stratovirt.backends.aio_threads import MAX_WORKERS, ThreadEngine
from stratovirt.backends.block import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, BlockRequest, RawImage
from stratovirt.config.vm import DriveConfig
from stratovirt.errors import ConfigError, HostError
from stratovirt.hostmap import HostMapping

MEBIBYTE = 1 << 20
SIZE = 4 * MEBIBYTE
PAGE = 4096


def usable(name: str) -> bool:
    try:
        aio.probe(name)
    except ConfigError:
        return False
    return True


ENGINES = [pytest.param(name, marks=pytest.mark.skipif(not usable(name), reason=f"this host has no {name}"))
           for name in aio.ENGINES]


@pytest.fixture
def ram() -> memoryview:
    return HostMapping(2 * SIZE).view


Open = Callable[..., ThreadEngine]


@pytest.fixture
def open_engine(tmp_path: Path) -> Iterator[Open]:
    engines: list[ThreadEngine] = []

    def make(name: str, content: bytes | None = None, **options: object) -> ThreadEngine:
        path = tmp_path / "disk.img"
        path.write_bytes(bytes(SIZE) if content is None else content)
        direct = options.pop("direct", None)
        # Without O_DIRECT the native engine is refused for the time it takes, not for what it does.
        image = RawImage(DriveConfig("d", str(path), direct=direct, aio="threads", **options))  # type: ignore[arg-type]
        image.engine = name
        engines.append(aio.open_engine(image))
        assert engines[-1].name == name
        return engines[-1]

    yield make
    for engine in engines:
        assert engine.in_flight == 0
        engine.close()
        engine.image.close()


def finish(engine: ThreadEngine) -> list[BlockRequest]:
    """Everything that is on its way, in the order it ends."""
    done: list[BlockRequest] = []
    while engine.in_flight:
        assert select.select([engine.fd], [], [], 30)[0], f"{engine.in_flight} requests do not end"
        done += engine.reap()
    return done


def do(engine: ThreadEngine, request: BlockRequest) -> HostError | None:
    engine.submit(request)
    engine.kick()
    assert finish(engine) == [request]
    return request.error


def data_request(kind: int, views: list[memoryview], offset: int) -> BlockRequest:
    return BlockRequest(kind, views, offset, sum(map(len, views)))


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("name", ENGINES)
def test_many_requests_of_all_shapes(open_engine: Open, ram: memoryview, name: str, direct: bool | None) -> None:
    """Writes in random order and pieces, far more than fit at once; each ends once; the file and a second read agree."""
    engine = open_engine(name, direct=direct)
    generator = random.Random(5)
    content = os.urandom(SIZE)
    ram[:SIZE] = content
    offsets = list(range(0, SIZE, PAGE))
    generator.shuffle(offsets)

    def views(start: int) -> list[memoryview]:
        cut = generator.choice((0, 512, 1024, 1000, 1))
        page = ram[start : start + PAGE]
        return [page[:cut], page[cut:]] if cut else [page]

    for kind, base in ((WRITE, 0), (READ, SIZE)):
        asked = [data_request(kind, views(base + offset), offset) for offset in offsets]
        for request in asked:
            engine.submit(request)
        assert engine.in_flight == len(asked)
        engine.kick()
        done = finish(engine)
        assert len(done) == len(asked) and set(map(id, done)) == set(map(id, asked))
        assert [str(request.error) for request in done if request.error] == []
    assert do(engine, BlockRequest(FLUSH, [], 0, 0)) is None
    assert Path(engine.image.path).read_bytes() == content
    assert ram[SIZE:].tobytes() == content


@pytest.mark.parametrize("name", ENGINES)
def test_buffers_and_offsets_of_any_alignment(open_engine: Open, ram: memoryview, name: str) -> None:
    content = os.urandom(SIZE)
    engine = open_engine(name, content)
    for start, offset, length in ((1, 512, 512), (513, 0, 4096), (4095, 1536, 1024), (7, 512, MEBIBYTE)):
        assert do(engine, data_request(READ, [ram[start : start + length]], offset)) is None
        assert ram[start : start + length].tobytes() == content[offset : offset + length]
        ram[start : start + length] = fresh = os.urandom(length)
        assert do(engine, data_request(WRITE, [ram[start : start + length]], offset)) is None
        content = content[:offset] + fresh + content[offset + length :]
    assert Path(engine.image.path).read_bytes() == content


@pytest.mark.parametrize("name", ENGINES)
def test_more_pieces_than_a_vector_takes(open_engine: Open, ram: memoryview, name: str) -> None:
    engine = open_engine(name)
    views = [ram[512 * number : 512 * number + 512] for number in range(1500)]
    for number, view in enumerate(views):
        view[:] = number.to_bytes(2, "little") * 256
    assert do(engine, data_request(WRITE, views, 1024)) is None
    assert Path(engine.image.path).read_bytes()[1024 : 1024 + 512 * 1500] == ram[: 512 * 1500].tobytes()


@pytest.mark.parametrize("direct", [None, False])
@pytest.mark.parametrize("name", ENGINES)
def test_a_read_beyond_the_end_is_an_error(open_engine: Open, ram: memoryview, name: str, direct: bool | None) -> None:
    engine = open_engine(name, direct=direct)
    os.truncate(engine.image.path, 2 * PAGE)
    for offset in (2 * PAGE, PAGE, SIZE // 2):
        error = do(engine, data_request(READ, [ram[: 2 * PAGE]], offset))
        assert error is not None and "the file ends there" in str(error)
    assert do(engine, data_request(READ, [ram[:PAGE]], PAGE)) is None


@pytest.mark.parametrize("name", ENGINES)
def test_errors_of_the_host_reach_the_request(open_engine: Open, ram: memoryview, name: str) -> None:
    engine = open_engine(name)
    wrong = os.open("/dev/full", os.O_RDWR)
    right = engine.image._fd, engine.image._buffered_fd
    engine.image._fd = engine.image._buffered_fd = wrong
    errors = [do(engine, data_request(WRITE, [ram[:PAGE]], 0)) for _ in range(3)]
    engine.image._fd, engine.image._buffered_fd = right
    os.close(wrong)
    assert [error.errno for error in errors if error is not None] == [errno.ENOSPC] * 3
    assert do(engine, data_request(WRITE, [ram[:PAGE]], 0)) is None


@pytest.mark.parametrize("name", ENGINES)
def test_discard_and_zeroes_among_reads_and_writes(open_engine: Open, ram: memoryview, name: str) -> None:
    content = os.urandom(SIZE)
    engine = open_engine(name, content, discard=True)
    zeroes = BlockRequest(WRITE_ZEROES, [], 2 * MEBIBYTE, 1536)
    zeroes.durable = True
    for request in (BlockRequest(DISCARD, [], MEBIBYTE, MEBIBYTE), zeroes, data_request(READ, [ram[:PAGE]], 0),
                    data_request(WRITE, [ram[SIZE : SIZE + PAGE]], 3 * MEBIBYTE), BlockRequest(FLUSH, [], 0, 0)):
        engine.submit(request)
    engine.kick()
    assert [request.error for request in finish(engine)] == [None] * 5
    after = Path(engine.image.path).read_bytes()
    assert after[MEBIBYTE : 2 * MEBIBYTE + 1536] == bytes(MEBIBYTE + 1536)
    assert after[3 * MEBIBYTE : 3 * MEBIBYTE + PAGE] == bytes(PAGE)
    assert after[:MEBIBYTE] == content[:MEBIBYTE] and after[2 * MEBIBYTE + 1536 : 3 * MEBIBYTE] == \
        content[2 * MEBIBYTE + 1536 : 3 * MEBIBYTE]


@pytest.mark.parametrize("name", ENGINES)
def test_a_durable_write_is_a_write(open_engine: Open, ram: memoryview, name: str) -> None:
    engine = open_engine(name)
    ram[:PAGE] = b"d" * PAGE
    request = data_request(WRITE, [ram[:PAGE]], PAGE)
    request.durable = True
    assert do(engine, request) is None
    assert Path(engine.image.path).read_bytes()[PAGE : 2 * PAGE] == b"d" * PAGE


@pytest.mark.parametrize("name", ENGINES)
def test_buffers_are_owned_until_the_request_ends(open_engine: Open, name: str) -> None:
    engine = open_engine(name)
    buffer = bytearray(PAGE)
    engine.submit(data_request(READ, [memoryview(buffer)], 0))
    engine.kick()
    with pytest.raises(BufferError):
        buffer.extend(b"x")  # it would move
    finish(engine)


def test_threads_are_few(open_engine: Open, ram: memoryview) -> None:
    engine = open_engine("threads")
    for number in range(200):
        engine.submit(data_request(READ, [ram[PAGE * number : PAGE * (number + 1)]], 0))
    finish(engine)
    assert 1 <= engine._workers <= MAX_WORKERS


@pytest.mark.parametrize(("module", "name"), [(aio_native, "native"), (aio_uring, "io_uring")])
def test_an_engine_that_the_host_lacks_is_refused_with_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(PAGE))

    def refuse(*_: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(module, "syscall", refuse)
    with pytest.raises(ConfigError) as caught:
        aio.probe(name)
    assert caught.value.value == name and "aio=threads" in caught.value.accepted and f"aio={name}" not in caught.value.accepted
    assert "Function not implemented" in str(caught.value)


@pytest.mark.parametrize(("module", "name"), [(aio_native, "native"), (aio_uring, "io_uring")])
def test_threads_stand_in_when_the_host_refuses_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(PAGE))
    image = RawImage(DriveConfig("d", str(path), direct=False))
    image.engine = name
    said: list[str] = []

    def refuse(*_: int) -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(module, "syscall", refuse)
    monkeypatch.setattr(aio.log, "warn", said.append)
    engine = aio.open_engine(image)
    assert engine.name == "threads" and len(said) == 1 and f"aio={name}" in said[0]
    engine.close()
    image.close()


@pytest.mark.parametrize("name", ["native", "io_uring"])
def test_what_the_kernel_does_not_take_threads_do(
    open_engine: Open, ram: memoryview, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Submission fails for every request: none is lost, none is done twice."""
    if not usable(name):
        pytest.skip(f"this host has no {name}")
    engine = open_engine(name)
    module = aio_native if name == "native" else aio_uring
    ram[:SIZE] = content = os.urandom(SIZE)

    def refuse(number: int, *arguments: int) -> int:
        if number in (module.IO_SUBMIT if name == "native" else -1, module.IO_URING_ENTER if name == "io_uring" else -1):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(number, *arguments)

    real = module.syscall
    monkeypatch.setattr(module, "syscall", refuse)
    asked = [data_request(WRITE, [ram[offset : offset + PAGE]], offset) for offset in range(0, SIZE, PAGE)]
    for request in asked:
        engine.submit(request)
    engine.kick()
    done = finish(engine)
    assert len(done) == len(asked) and not any(request.error for request in done)
    assert Path(engine.image.path).read_bytes() == content
    monkeypatch.undo()
    assert do(engine, data_request(READ, [ram[SIZE : SIZE + PAGE]], 0)) is None
    assert ram[SIZE : SIZE + PAGE].tobytes() == content[:PAGE]


def test_native_needs_o_direct(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(ConfigError, match='native aio type should be used with "direct" on'):
        RawImage(DriveConfig("d", str(path), direct=False, aio="native"))


def test_depth_is_a_power_of_two_as_rings_want() -> None:
    assert aio_kernel.DEPTH & (aio_kernel.DEPTH - 1) == 0

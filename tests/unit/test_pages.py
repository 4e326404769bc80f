"""Pages that a forked process gives back: only those that equal the file, and nothing that is written is lost.

Each test is a program of its own, because an interpreter's memory is laid out once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stratovirt.native import compiled

SOURCE = Path(__file__).resolve().parents[2] / "src"
PREPARED = """
    import gc, os, struct, sys, threading
    sys.path.insert(0, sys.argv[1])
    from stratovirt import hostmap
    from stratovirt.launcher import pages
    from stratovirt.native import compiled

    PAGE = hostmap.PAGE_SIZE

    def private(address, length):
        "Which pages of this memory are this process's own."
        with open("/proc/self/pagemap", "rb", 0) as file:
            file.seek(address // PAGE * 8)
            states = struct.unpack(f"{length // PAGE}Q", file.read(length // PAGE * 8))
        return [address + i * PAGE for i, state in enumerate(states) if state >> 63 and not state >> 61 & 1]

    def own():
        return {page for address, length, _ in pages._shared for page in private(address, length)}

    def give_back():
        given = 0
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        for address, length, file in pages._shared:
            for at in range(0, length, 64 * PAGE):
                given += compiled.give_back_equal(fd, address + at, file + at, min(64, (length - at) // PAGE))
        os.close(fd)
        return given

    def is_shared(address):
        return any(start <= address < start + length for start, length, _ in pages._shared)

    def in_child(function):
        "Its assertions hold there."
        pid = os.fork()
        if pid == 0:
            try:
                function()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    assert pages.keep_arenas()
    kept = [bytes([i % 251]) * 200 for i in range(30000)]  # some arenas of them
    words = [f"word {i}" for i in range(30000)]
    buffers = [bytearray(64) for _ in range(64)]
    places = pages.find()
    gc.freeze()
    sharing = pages.Sharing(places)
    sharing.share()
    assert pages._shared
    sharing.seal()
    assert sum(length for _, length, _ in pages._shared) > 6 << 20
"""

needs_compiled = pytest.mark.skipif(compiled is None, reason="the compiled module is not there")
pytestmark = [needs_compiled, pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="no /proc/self/pagemap")]


def run(program: str, prepared: str = PREPARED) -> None:
    code = textwrap.dedent(prepared) + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-IS", "-c", code, str(SOURCE)], capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_what_equals_is_given_back_and_what_differs_stays() -> None:
    run("""
        def child():
            for one in kept + words:  # counts go up, and come back
                pass
            changed = words[::1000]
            here = {id(one) & -PAGE for one in kept}
            assert len(here & own()) > 1000
            before = len(own())
            given = give_back()
            assert given > before // 2
            assert before - given <= len(own()) <= before - given + 100  # what this function writes to meanwhile
            for one in changed:
                assert sys.getrefcount(one) == 4  # the list of all, ours, the loop's, the call's
            assert kept == [bytes([i % 251]) * 200 for i in range(30000)]
            assert words == [f"word {i}" for i in range(30000)]
            give_back()
            assert give_back() < 100

        in_child(child)
        in_child(lambda: in_child(child))
        assert all(sys.getrefcount(word) == 3 for word in words)
        """)


def test_the_kernel_may_write_meanwhile() -> None:
    """Another process has the kernel write into a small buffer while this one's lock is held, at any moment."""
    run("""
        def child():
            buffer = next(buffer for buffer in buffers if is_shared(hostmap.address_of(buffer)[0]))
            address = hostmap.address_of(buffer)[0] & -PAGE
            file = next(file + address - start for start, length, file in pages._shared if start <= address < start + length)
            source, feed = os.pipe()
            done, tell = os.pipe()
            zeros, rounds, wrong, ended = bytes(64), 20000, [], []
            writer = os.fork()
            if writer == 0:
                for number in range(1, rounds + 1):
                    os.write(feed, struct.pack("<8Q", *[number] * 8))
                    os.read(done, 1)
                os._exit(0)

            def receive():
                for number in range(1, rounds + 1):
                    os.readv(source, [buffer])
                    if buffer != struct.pack("<8Q", *[number] * 8):
                        wrong.append((number, bytes(buffer)))
                    buffer[:] = zeros
                    os.write(tell, b".")
                ended.append(True)

            thread = threading.Thread(target=receive)
            thread.start()
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
            given = 0
            while not ended:
                for _ in range(10):
                    given += compiled.give_back_equal(pagemap, address, file, 1)
            thread.join()
            os.waitpid(writer, 0)
            assert not wrong, (len(wrong), wrong[:3])

        in_child(child)
        """)


def test_an_arena_that_is_not_used_any_more_is_nobody_elses() -> None:
    run("""
        def child():
            del kept[:], words[:]
            gc.unfreeze()
            gc.collect()
            with open("/proc/self/maps") as file:
                maps = [line.split() for line in file]
            mapped = [tuple(int(word, 16) for word in line[0].split("-")) for line in maps if "stratovirt-launcher" in line[-2]]
            for address, length, _ in pages._shared:
                assert any(start <= address and address + length <= end for start, end in mapped), hex(address)
            again = [bytes([i % 249]) * 200 for i in range(40000)]  # in the same arenas
            give_back()
            assert again == [bytes([i % 249]) * 200 for i in range(40000)]

        in_child(child)
        """)


def test_the_file_cannot_be_changed() -> None:
    run("""
        import mmap
        address, length, file = pages._shared[0]
        if os.geteuid() == 0:
            with open("/proc/self/maps") as maps:
                name = next(line.split()[0] for line in maps if "stratovirt-launcher" in line)
            try:
                fd = os.open(f"/proc/self/map_files/{name}", os.O_RDWR)
            except OSError:
                sys.exit()  # a kernel, or a place, where not even root has these
            for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 30),
                           lambda: mmap.mmap(fd, PAGE)):
                try:
                    change()
                except PermissionError:
                    continue
                raise AssertionError("it can")
        """)


def test_nothing_is_shared_with_a_second_thread_or_without_arenas() -> None:
    unshared = PREPARED[: PREPARED.index("    sharing = ")]
    run("""
        wait = threading.Event()
        thread = threading.Thread(target=wait.wait)
        thread.start()
        pages.Sharing(places).share()
        assert not pages._shared
        wait.set()
        thread.join()
        pages.Sharing([]).share()
        assert not pages._shared
        from stratovirt.loop import EventLoop
        loop = EventLoop()
        pages.GiveBack(loop)
        assert not loop._timers
        """, unshared)
    environment = {**os.environ, "PYTHONMALLOC": "malloc"}
    code = textwrap.dedent(unshared) + "assert places == []"
    done = subprocess.run([sys.executable, "-sS", "-c", code, str(SOURCE)], env=environment, capture_output=True, text=True,
                          timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_slices_on_the_loop() -> None:
    run("""
        from stratovirt.loop import EventLoop

        class Clock:
            now = 0.0
            def __call__(self):
                return self.now

        def child():
            clock = Clock()
            loop = EventLoop(clock)
            back = pages.GiveBack(loop)
            for one in kept:
                pass
            before = len(own())
            waits = []
            for _ in range(14):
                start = clock.now
                clock.now = loop._timers[0].deadline
                waits.append(clock.now - start)
                while True:
                    loop.run_once(0)
                    if loop._timers[0].deadline - clock.now > 10 * pages._SLICE_SECONDS:
                        break
                    clock.now = loop._timers[0].deadline
            assert back._given < before // 2  # by now there is little
            assert len(own()) < before // 2
            assert waits[0] == pages.FIRST_SECONDS
            assert waits == sorted(waits) and waits[-1] == pages.LONGEST_SECONDS

        in_child(child)
        """)


def test_what_a_child_is_like_at_rest_is_what_the_next_ones_give_back() -> None:
    """The file has the first one's pages then, and neither this process nor any other sees another content."""
    run("""
        held = []

        def change():
            for one in words[::100]:
                held.append(one)  # as each child will

        ready, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            change()
            os.write(tell, b".")
            os.read(os.pipe()[0], 1)
        os.read(ready, 1)
        found = sharing.look(pid)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        before = own()
        changed = sharing.take_over(found)
        assert changed > 100
        assert len(own() - before) >= changed - 100, "pages of this process's own now"
        sharing.seal()
        assert all(sys.getrefcount(word) == 3 for word in words)
        assert kept == [bytes([i % 251]) * 200 for i in range(30000)] and words == [f"word {i}" for i in range(30000)]

        def child():
            change()
            pages_of_words = {id(word) & -PAGE for word in words[::100]}
            before = len(own() & pages_of_words)
            give_back()
            assert len(own() & pages_of_words) < before // 2
            assert all(sys.getrefcount(word) == 5 for word in words[100::100])  # held, among others
            assert words == [f"word {i}" for i in range(30000)]

        in_child(child)
        in_child(lambda: in_child(child))
        """, PREPARED.replace("    sharing.seal()\n", ""))


def test_settled_code_does_what_it_did() -> None:
    """Specialized or not, before and after: the same results, and no write to it any more (CPython 3.11)."""
    run("""
        from stratovirt.native import compiled

        class Point:
            def __init__(self, x):
                self.x = x

        def work(n):
            total, seen = 0, {}
            for i in range(n):
                point = Point(i) if i % 3 else None
                total += point.x if point is not None else len(str(i))
                seen[i % 7] = seen.get(i % 7, 0) + i
                first, second = (i, total)
                total = first + second - i if total > 3 else total * 1.0
            try:
                missing.name
            except NameError as error:
                return total, sorted(seen.items()), str(error)

        class Other(Point):
            x = property(lambda self: 5, lambda self, value: None)

        def code_of(function):
            return function.__code__._co_code_adaptive

        for times in (0, 3, 50):
            fresh = type(work)(work.__code__.replace(), globals())
            expected = work(100)
            for _ in range(times):
                fresh(20)
            plain = fresh.__code__.co_code
            compiled.settle_code(fresh.__code__)
            assert fresh.__code__.co_code == plain
            before = code_of(fresh)
            assert fresh(100) == expected
            Point, kept_point = Other, Point
            assert fresh(100)[1] == expected[1]  # with another class, so that what was specialized has to do without
            Point = kept_point
            if times == 0 and sys.version_info[:2] == (3, 11):
                for _ in range(50):
                    fresh(20)
                assert code_of(fresh) == before
        try:
            compiled.settle_code(work)
        except TypeError:
            pass
        else:
            raise AssertionError
        """, "    import sys\n    sys.path.insert(0, sys.argv[1])\n")

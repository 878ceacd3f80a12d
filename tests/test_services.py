"""The embedded servers keep their data, end with their owner, and admit only clients with the password."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
import redis

from deploy.local.errors import FolderInUse, ServerMissing, UserRefused
from deploy.local.leftovers import processes_in
from deploy.local.postgres import RUN_AS_WAYS, Postgres, bytes_for_log, cache_megabytes, wal_megabytes
from deploy.local.server import first_binary
from deploy.local.services import Services, embedded_services, running_services
from deploy.local.valkey import Valkey
from tests.command import ROOT
from tests.waiting import until

pytestmark = pytest.mark.integration

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

OWNER = """
import sys, pathlib
from deploy.local.services import embedded_services
with embedded_services(pathlib.Path(sys.argv[1]), durable=False) as services:
    print(services.database_url, services.redis_url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def owner_of(folder: Path, prefix: Sequence[str] = ()) -> Iterator[tuple[subprocess.Popen[str], Services]]:
    """Run another process that owns *folder* until its stdin closes."""
    command = [*prefix, sys.executable, "-c", OWNER, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process, Services(*process.stdout.readline().split())


def is_listening(url: str) -> bool:
    """Return whether a server accepts connections at *url*."""
    parts = urlsplit(url)
    with socket.socket() as client:
        return client.connect_ex((parts.hostname, parts.port)) == 0


def write_row(database_url: str, value: int) -> None:
    """Commit one more row to a table of the test's own."""
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (value bigint)")
        connection.execute("INSERT INTO kept VALUES (%s)", (value,))


def rows(database_url: str) -> list[int]:
    """Return the values that `write_row` has committed."""
    with psycopg.connect(database_url) as connection:
        return [value for (value,) in connection.execute("SELECT value FROM kept ORDER BY value")]


def server_processes(folder: Path) -> list[int]:
    """Return every process of both servers in a data folder."""
    places = [(folder / "postgres/cluster", "postgres"), (folder / "valkey", "valkey-server")]
    places += [(folder / "valkey", "redis-server")]
    return [process for place, program in places for process in processes_in(place, program)]


# ---- Life and death ----


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param((), id="this user"),
        pytest.param(RUN_AS_WAYS[0].prefix, marks=as_root, id="ordinary user"),
        pytest.param(
            ("unshare", "--user", "--map-user=4242", "--map-group=4242"), marks=as_root, id="user without a name"
        ),
    ],
)
def test_owner_killed(tmp_path: Path, prefix: Sequence[str]) -> None:
    """A kill -9 of the owner ends both servers, and after the next start every row is there."""
    with owner_of(tmp_path / "data", prefix) as (process, services):
        write_row(services.database_url, 1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not is_listening(services.database_url) and not is_listening(services.redis_url))

    with owner_of(tmp_path / "data", prefix) as (_, again):
        assert rows(again.database_url) == [1]


@on_linux
def test_everything_killed(tmp_path: Path) -> None:
    """A kill -9 of the owner and of every server process costs no row."""
    with owner_of(tmp_path) as (process, services):
        write_row(services.database_url, 1)
        for process_id in [process.pid, *server_processes(tmp_path)]:
            with suppress(ProcessLookupError):  # PostgreSQL's children do not outlive it for long
                os.kill(process_id, signal.SIGKILL)

    with embedded_services(tmp_path, durable=False) as again:
        assert rows(again.database_url) == [1]


def test_next_start_at_once(tmp_path: Path) -> None:
    """A start does not wait for a killed owner's processes to end by themselves."""
    with owner_of(tmp_path) as (process, services):
        write_row(services.database_url, 1)
        process.send_signal(signal.SIGKILL)
        with embedded_services(tmp_path, durable=False) as again:
            assert rows(again.database_url) == [1]
            assert is_listening(again.redis_url)


def test_leftover_server(tmp_path: Path, own_postgres: Postgres, postgres_bin: Path | None) -> None:
    """A start ends a server that outlived its owner, and finds its rows."""
    write_row(own_postgres.url, 1)

    with Postgres(own_postgres.folder, durable=False, postgres_bin=postgres_bin) as next_one:
        assert rows(next_one.url) == [1]
        assert not is_listening(own_postgres.url)


def test_stale_process_file(own_postgres: Postgres) -> None:
    """A process file that names a living program other than a server does not prevent a start."""
    write_row(own_postgres.url, 1)
    own_postgres.kill()
    process_file = own_postgres.folder / "cluster/postmaster.pid"
    lines = process_file.read_text().splitlines(keepends=True)
    process_file.write_text("".join([f"{os.getpid()}\n", *lines[1:]]))

    own_postgres.start()

    assert rows(own_postgres.url) == [1]


def test_half_made_cluster(tmp_path: Path, postgres_bin: Path | None) -> None:
    """A cluster that a killed first start left unfinished is made again."""
    (tmp_path / "postgres/cluster.new/base").mkdir(parents=True)

    with Postgres(tmp_path / "postgres", durable=False, postgres_bin=postgres_bin) as server:
        write_row(server.url, 1)


def test_restart_keeps_port(own_postgres: Postgres, own_valkey: Valkey) -> None:
    """A restarted server has the same port and its rows."""
    before = own_postgres.url, own_valkey.url
    write_row(own_postgres.url, 1)

    own_postgres.restart()
    own_valkey.restart()

    assert (own_postgres.url, own_valkey.url) == before
    assert rows(own_postgres.url) == [1]
    with redis.Redis.from_url(own_valkey.url) as client:
        assert client.ping()


def test_killed_and_started(own_postgres: Postgres) -> None:
    """A commit is kept when the server is killed right after it."""
    write_row(own_postgres.url, 1)
    own_postgres.kill()
    own_postgres.start()
    write_row(own_postgres.url, 2)

    assert rows(own_postgres.url) == [1, 2]


def test_flushed(own_valkey: Valkey) -> None:
    """The broker goes on after a client wipes it."""
    with redis.Redis.from_url(own_valkey.url) as client:
        client.set("key", "value")
        client.flushall()

        assert client.get("key") is None


def test_stopped(tmp_path: Path) -> None:
    """After the block no server listens and no URL is announced."""
    with embedded_services(tmp_path, durable=False) as services:
        assert is_listening(services.database_url)
        assert is_listening(services.redis_url)

    assert not is_listening(services.database_url)
    assert not is_listening(services.redis_url)
    assert running_services(tmp_path) is None


@as_root
@on_linux
def test_root_without_namespaces(tmp_path: Path, postgres_bin: Path | None) -> None:
    """Where root cannot have a user namespace the server runs as another user, and the same data works either way."""
    folder = tmp_path / "postgres"
    with Postgres(folder, durable=False, postgres_bin=postgres_bin, ways=RUN_AS_WAYS[1:]) as as_another_user:
        write_row(as_another_user.url, 1)
        (postmaster, *_) = processes_in(folder / "cluster", "postgres")
        assert Path(f"/proc/{postmaster}").stat().st_uid != 0

    with Postgres(folder, durable=False, postgres_bin=postgres_bin) as in_a_namespace:
        assert rows(in_a_namespace.url) == [1]


# ---- Access ----


def test_no_password(own_postgres: Postgres, own_valkey: Valkey) -> None:
    """Neither server admits a client without the password, not even the database's superuser."""
    address = f"127.0.0.1:{own_postgres.port}"
    for stranger in ("payfold@", "payfold:guess@", "postgres@", "postgres:guess@"):
        for database in ("payfold", "postgres"):
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(f"postgresql://{stranger}{address}/{database}")
    with redis.Redis(port=own_valkey.port) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


@on_linux
def test_loopback_only(tmp_path: Path) -> None:
    """Every socket that a server listens on is at 127.0.0.1."""
    with embedded_services(tmp_path, durable=False):
        addresses = listening_addresses(server_processes(tmp_path))

    assert addresses == ["0100007F", "0100007F"]  # as /proc writes 127.0.0.1


def listening_addresses(process_ids: Sequence[int]) -> list[str]:
    """Return the local address of every TCP socket on which the processes listen, in hexadecimal."""
    links = [link for process in process_ids for link in Path(f"/proc/{process}/fd").iterdir()]
    ours = {str(link.readlink()) for link in links if link.is_symlink()}
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return [line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in ours]


@on_linux
def test_secrets_stay_secret(tmp_path: Path) -> None:
    """No password is on a command line, in a server's environment, in a log or in a Python representation."""
    with embedded_services(tmp_path, durable=False) as services:
        passwords = [urlsplit(url).password or "" for url in (services.database_url, services.redis_url)]
        processes = [Path(f"/proc/{process}") for process in server_processes(tmp_path)]
        readable = [(process / name).read_text() for process in processes for name in ("cmdline", "environ")]
        readable += [log.read_text() for log in tmp_path.rglob("*.log")]
        readable += [repr(services), str(services)]

    assert all(passwords)
    assert not [text for text in readable for password in passwords if password in text]


def test_files_are_private(tmp_path: Path) -> None:
    """No other user can list the data folder or read a file with a password."""
    with embedded_services(tmp_path / "data", durable=False):
        assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
        for name in ("services.json", "postgres/password", "valkey/password", "valkey/valkey.conf"):
            assert (tmp_path / "data" / name).stat().st_mode & 0o777 == 0o600


# ---- One owner ----


def test_second_owner(tmp_path: Path) -> None:
    """A second owner gets an error with the folder, its owner, and the remedy."""
    with (
        owner_of(tmp_path) as (process, _),
        pytest.raises(FolderInUse, match=f"{tmp_path} is in use by process {process.pid}: .* name another"),
        embedded_services(tmp_path, durable=False),
    ):
        pass


def test_two_folders(tmp_path: Path) -> None:
    """The servers of two data folders run at the same time."""
    with embedded_services(tmp_path / "a", durable=False) as a, embedded_services(tmp_path / "b", durable=False) as b:
        write_row(a.database_url, 1)
        write_row(b.database_url, 2)

        assert (rows(a.database_url), rows(b.database_url)) == ([1], [2])


def test_found_by_others(tmp_path: Path) -> None:
    """Other processes find the running servers, until their owner is killed."""
    assert running_services(tmp_path) is None
    with owner_of(tmp_path) as (process, services):
        assert running_services(tmp_path) == services
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert running_services(tmp_path) is None


def test_given_server(tmp_path: Path, own_valkey: Valkey) -> None:
    """A given URL replaces its embedded server."""
    with embedded_services(tmp_path / "data", durable=False, redis_url=own_valkey.url) as services:
        assert services.redis_url == own_valkey.url

    assert is_listening(own_valkey.url)


# ---- Missing binaries, users and space ----


def test_no_binary() -> None:
    """Without a binary the error names the setting that makes the binary unnecessary."""
    with pytest.raises(ServerMissing, match=r"no PostgreSQL on this machine.*set DATABASE_URL"):
        first_binary([], "PostgreSQL", "DATABASE_URL")


def test_a_server_behind_a_link(tmp_path: Path) -> None:
    """Debian's redis-server is a link to redis-check-rdb, which is a server only when started as redis-server."""
    program = tmp_path / "redis-check-rdb"
    program.touch(0o755)
    link = tmp_path / "redis-server"
    link.symlink_to(program.name)

    assert Valkey(tmp_path / "data", valkey_bin=link).binary == link


def test_postgres_behind_a_link(tmp_path: Path) -> None:
    """PostgreSQL's tools are found in the folder of the binary itself, and not in the folder of a link to it."""
    program = tmp_path / "15" / "postgres"
    program.parent.mkdir()
    program.touch(0o755)
    (tmp_path / "postgres").symlink_to(program)

    assert Postgres(tmp_path / "data", postgres_bin=tmp_path).binary == program


def test_chosen_binaries_missing(tmp_path: Path) -> None:
    """A named folder without a server is an error, and no other folder is tried."""
    with pytest.raises(ServerMissing, match=str(tmp_path)):
        Postgres(tmp_path / "data", postgres_bin=tmp_path)
    with pytest.raises(ServerMissing, match="REDIS_URL"):
        Valkey(tmp_path / "data", valkey_bin=tmp_path / "valkey-server")


@as_root
def test_user_refused(tmp_path: Path, postgres_bin: Path | None) -> None:
    """Where root cannot become another user the error names the remedy."""
    server = Postgres(tmp_path / "postgres", postgres_bin=postgres_bin, ways=())

    with pytest.raises(UserRefused, match="ordinary user, or set DATABASE_URL"):
        server.start()


@pytest.mark.parametrize(("gigabytes", "megabytes"), [(0.5, 128), (1, 128), (4, 512), (24, 2048)])
def test_pages_are_kept_in_a_share_of_the_memory(gigabytes: float, megabytes: int) -> None:
    """PostgreSQL keeps pages in an eighth of the memory, in no less than it takes by itself and no more than 2 GB."""
    assert cache_megabytes(int(gigabytes * 1024**3)) == megabytes


@pytest.mark.parametrize(("gigabytes", "megabytes"), [(1, 1024), (4, 1024), (12, 3072), (500, 8192)])
def test_a_full_disk_gets_no_large_log(gigabytes: int, megabytes: int) -> None:
    """Checkpoints are as rare as the disk allows, and never more frequent than PostgreSQL makes them by itself."""
    assert wal_megabytes(gigabytes * 1024**3) == megabytes


def test_old_files_of_the_log_count_as_room(tmp_path: Path) -> None:
    """PostgreSQL writes over the files of its log, so a disk that is full of them has room for as many."""
    (tmp_path / "pg_wal").mkdir()
    for number in (1, 2):
        with (tmp_path / f"pg_wal/00000001000000000000000{number}").open("wb") as segment:
            segment.truncate(2**40)

    assert bytes_for_log(tmp_path) >= 2 * 2**40


def titles(server: Postgres) -> list[str]:
    """Return what each process of a server calls itself."""
    first = (server.folder / "cluster/postmaster.pid").read_text().split("\n", 1)[0]
    with suppress(psutil.NoSuchProcess):
        return [" ".join(each.cmdline()) for each in psutil.Process(int(first)).children()]
    return []


def test_memory_is_filled_again_after_a_restart(tmp_path: Path, postgres_bin: Path | None) -> None:
    """A durable server that starts again reads the pages that were in its memory, before anyone asks for them."""
    with Postgres(tmp_path / "postgres", postgres_bin=postgres_bin) as server:
        if not (server.binary.parent.parent / "lib/pg_prewarm.so").exists():
            pytest.skip("this PostgreSQL has no pg_prewarm")
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE known AS SELECT repeat('x', 1000) FROM generate_series(1, 1000)")
        # What a server has in memory is noted at its end by a process that may begin after the server is ready.
        until(lambda: any("autoprewarm leader" in each for each in titles(server)))
        server.restart()
        log = server.folder / "server.log"
        until(lambda: "autoprewarm successfully prewarmed" in log.read_text())
        with psycopg.connect(server.url) as connection:
            plan = connection.execute("EXPLAIN (ANALYZE, BUFFERS) SELECT * FROM known").fetchall()

    buffers = next(line.strip() for (line,) in plan if "Buffers:" in line)
    assert buffers.startswith("Buffers: shared hit=")
    assert "read=" not in buffers


_COLLATE = "SELECT datcollate FROM pg_database WHERE datname = current_database()"


def test_text_is_ordered_by_its_bytes(own_postgres: Postgres) -> None:
    """No update of the machine's locales changes an index; letters beyond ASCII have a lower case all the same."""
    with psycopg.connect(own_postgres.url) as connection:
        assert connection.execute(_COLLATE).fetchone() == ("C",)
        ordered = connection.execute("SELECT array_agg(t ORDER BY t), lower('É') FROM unnest('{b,B,é,z}'::text[]) AS t")
        assert ordered.fetchone() == (["B", "b", "z", "é"], "é")


def test_databases_are_dropped_in_one_way() -> None:
    """Only there is a vacuum waited for that has begun in them."""
    dropping = [
        path.relative_to(ROOT).as_posix()
        for folder in ("api", "deploy", "schemas", "tests", "worker")
        for path in (ROOT / folder).rglob("*.py")
        if '"DROP ' + "DATABASE" in path.read_text()
    ]
    assert dropping == ["deploy/local/databases.py"]

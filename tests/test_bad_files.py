"""x"""

# Bad files


def snapshot(folder: Path) -> dict[str, str]:
    """Contents by name; SQLite's -wal and -shm, which every reader of a WAL file needs, only if they hold data."""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    empty = [name for name in digests if name.endswith("-shm") or (name.endswith("-wal") and not os.path.getsize(folder / name))]
    return {name: digest for name, digest in digests.items() if name not in empty}


def test_reading_writes_nothing(filled: Path) -> None:
    before = snapshot(filled.parent)
    assert list(before) == ["a.db"]
    assert len(read_records(filled, "sm_90")[1]) == 2
    with pytest.raises(DatabaseError):
        read_records(filled.parent / "missing.db", "sm_90")
    assert snapshot(filled.parent) == before


@pytest.fixture
def without_permissions() -> Iterator[Path]:
    """A folder in which the present user may only read; root becomes nobody for as long."""
    folder = Path(tempfile.mkdtemp())
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_a_folder_that_cannot_be_written(without_permissions: Path, filled: Path) -> None:
    folder = without_permissions
    expected = read_records(filled, "sm_90")
    shutil.copy(filled, folder / "a.db")
    (folder / "unfinished.db").write_bytes(filled.read_bytes())
    (folder / "unfinished.db-wal").write_bytes(b"not yet in the file")
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    with pytest.raises(PermissionError):
        (folder / "b.db").touch()
    assert read_records(folder / "a.db", "sm_90") == expected
    with pytest.raises(DatabaseError, match=r"unfinished\.db can't be used"):
        read_records(folder / "unfinished.db", "sm_90")
    with pytest.raises(DatabaseError, match=r"b\.db can't be used .*RMSNORM_TUNING_DB"):
        open_for_writing(folder / "b.db")


@pytest.mark.parametrize(("damage", "found"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_a_bad_file_is_a_database_error(filled: Path, damage: object, found: str) -> None:
    damage(filled)
    with pytest.raises(DatabaseError) as caught:
        read_records(filled, "sm_90")
    for part in (str(filled), found, "name another file by RMSNORM_TUNING_DB or --db"):
        assert part in str(caught.value)


@pytest.mark.parametrize("damage", [damage_random, damage_directory, damage_newer])
def test_a_writer_refuses_a_bad_file_and_leaves_it(filled: Path, damage: object) -> None:
    damage(filled)
    before = filled.read_bytes() if filled.is_file() else b""
    with pytest.raises(DatabaseError, match="name another file"):
        open_for_writing(filled)
    assert (filled.read_bytes() if filled.is_file() else b"") == before


def test_a_writer_refuses_another_programs_file(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "a.db")
    connection.execute("CREATE TABLE song (title)")
    with pytest.raises(DatabaseError, match="another program"):
        open_for_writing(tmp_path / "a.db")
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("song",)]
    connection.close()


@given(st.lists(st.tuples(st.integers(100, 2**15), st.binary(min_size=1, max_size=8)), min_size=1, max_size=30))
@example([(1665, b"\x80")])  # SQLite's message about the schema is no UTF-8 then
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_are_a_miss_or_valid_records(filled: Path, flips: list[tuple[int, bytes]]) -> None:
    content = bytearray(filled.read_bytes())
    for at, values in flips:
        content[at % len(content) : at % len(content) + len(values)] = values
    damaged = filled.parent / "damaged.db"
    damaged.write_bytes(content)
    try:
        devices, found = read_records(damaged, "sm_90")
    except DatabaseError:
        return
    assert read_jsonl(write_jsonl({*devices, DEVICE}, [replace(record, device_uid=DEVICE.uid) for record in found]))


BAD_VALUES = ["params = '{'", "params = '[]'", "source = 'new'", "rows = 0", "cols = 'many'", "x_dtype = 'int3'", "low_us = 9e999"]


@pytest.mark.parametrize("change", BAD_VALUES)
def test_a_bad_row_is_skipped_alone(filled: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    connection = sqlite3.connect(filled)
    connection.execute(f"UPDATE record SET {change} WHERE trial_uid = 't1'")
    connection.commit()
    connection.close()
    with caplog.at_level(logging.WARNING, logger="tuned_rmsnorm"):
        assert [record.trial_uid for record in read_records(filled, "sm_90")[1]] == ["t2"]
    assert "ignored 1 of 2 rows" in caplog.text


def test_a_device_whose_fingerprint_is_not_its_uid_is_skipped(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    connection.execute("UPDATE device SET sm_count = 7")
    connection.commit()
    connection.close()
    assert read_records(filled, "sm_90")[0] == []


def test_a_locked_file_is_a_quick_error(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("PRAGMA journal_mode = DELETE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseError, match="locked by another process"):
        read_records(filled, "sm_90")
    monkeypatch.setattr(store, "WRITE_TIMEOUT_S", 0.1)
    with open_for_writing_later(filled) as database, pytest.raises(DatabaseError, match="locked by another process"):
        database.add_device(OTHER)
    other.execute("ROLLBACK")
    other.close()
    assert len(read_records(filled, "sm_90")[1]) == 2


def open_for_writing_later(path: Path) -> store.Store:
    """A writer as one that had opened before the lock was taken."""
    return store.Store(path, sqlite3.connect(path, timeout=store.WRITE_TIMEOUT_S, isolation_level=None))


def test_a_reader_does_not_wait_for_a_writer(filled: Path) -> None:
    other = sqlite3.connect(filled, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("DELETE FROM record")
    assert len(read_records(filled, "sm_90")[1]) == 2
    other.execute("COMMIT")
    assert read_records(filled, "sm_90")[1] == []
    other.close()

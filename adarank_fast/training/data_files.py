"""Tables from files of every format, `datasets` folders and the hub. No torch here."""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from adarank_fast.errors import AdarankError, AdarankFileNotFoundError, AdarankImportError
from adarank_fast.json_values import parse

FORMATS = ".jsonl, .json, .csv, .tsv, .txt, .parquet, each also as .gz; a datasets folder; a name"
LINES = (".jsonl", ".ndjson", ".json")
SEPARATED = (".csv", ".tsv")
PLAIN = (".txt", ".text")
SUFFIXES = (*LINES, *SEPARATED, *PLAIN, ".parquet")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# what files begin with that are none of these formats: what they are, and the remedy
OTHERS = (
    (b"\xd0\xcf\x11\xe0", "an Excel workbook; save it as CSV UTF-8"),
    (b"\xff\xfe", "UTF-16; convert it: `iconv -f utf-16 -t utf-8`, or save it as CSV UTF-8"),
    (b"\xfe\xff", "UTF-16; convert it: `iconv -f utf-16 -t utf-8`, or save it as CSV UTF-8"),
    (b"BZh", "bzip2; unpack it (bunzip2)"),
    (b"\xfd7zXZ", "xz; unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "Zstandard; unpack it (unzstd)"),
    (b"ARROW1", "an Arrow file; name the folder that save_to_disk made"),
)

Row = Mapping[str, Any]  # column -> value, as the file has it


@dataclass(frozen=True)
class Table:
    """Rows with named columns.

    Attributes:
        name: as it is given, for messages.
        columns: in the file's order.
        rows: column -> value; a column may be absent.
        places: where each row is, for messages: "line 3".
        class_names: names of classes, by number, of the columns of a dataset that have them.
        notes: what was assumed.
        plain: whether it is text without columns.
    """

    name: str
    columns: list[str]
    rows: list[Row]
    places: list[str]
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plain: bool = False


def read_table(source: str | os.PathLike[str]) -> Table:
    """Read rows; the suffix says how, `.gz` may follow it.

    Args:
        source: a file, UTF-8; a folder of `datasets`' save_to_disk; or a name of the hub, which
            `:split` may follow.

    Raises:
        AdarankFileNotFoundError: there is no such file, and it is no name of the hub's.
        AdarankImportError: what reads the format is not installed.
        AdarankError: one line that names the file, the line, the value and the remedy.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if not path.exists():
        return _from_hub(name)
    if path.is_dir():
        return _from_folder(name, path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AdarankError(f"cannot read {name}: {error.strerror}") from error
    kind = path.suffix.lower()
    if kind == ".gz" or content[:2] == b"\x1f\x8b":
        kind = Path(path.stem).suffix.lower() if kind == ".gz" else kind
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise AdarankError(f"{name} is damaged or no gzip: {error}; copy it anew") from None
    _refuse_others(name, kind, content)
    if kind == ".parquet" or content[:4] == b"PAR1":
        return _from_parquet(name, content)
    if kind not in SUFFIXES:
        raise AdarankError(f"{name}: unknown suffix {kind!r}; use {FORMATS}")
    text = _decode(name, content)
    if kind in PLAIN:
        lines = [(n, line.strip()) for n, line in enumerate(text.split("\n"), 1)]
        found = [(number, {"text": line}) for number, line in lines if line]
        return replace(_table(name, found), plain=True)
    if kind in SEPARATED:
        return _from_csv(name, text, "\t" if kind == ".tsv" else ",")
    if kind == ".json" and text.lstrip()[:1] == "[":
        return _from_array(name, text)
    return _table(name, list(_json_lines(name, text)))


def _refuse_others(name: str, kind: str, content: bytes) -> None:
    """Refuse common files of other formats, each with its own remedy."""
    if content[:4] == b"PK\x03\x04" or kind in (".zip", ".xlsx", ".xls"):
        excel = kind in (".xlsx", ".xlsm", ".xls") or b"xl/workbook" in content
        what = "an Excel workbook; save it as CSV UTF-8" if excel else "a zip archive; unpack it"
        raise AdarankError(f"{name} is {what}")
    for start, what in OTHERS:
        if content.startswith(start):
            raise AdarankError(f"{name} is {what}")
    if (
        kind != ".parquet"
        and content[:4] != b"PAR1"
        and content[:400].count(0) * 4 > len(content[:400])
    ):
        raise AdarankError(f"{name} is UTF-16 or no text; convert it: `iconv -f utf-16 -t utf-8`")


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise AdarankError(
            f"{name}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; convert the "
            f"file, for example with `iconv -f latin1 -t utf-8`"
        ) from None


def _table(name: str, rows: Sequence[tuple[int, Row]], unit: str = "line") -> Table:
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not rows:
        raise AdarankError(f"{name} holds no rows; give a file with at least one")
    places = [f"{unit} {number}" for number, _ in rows]
    return Table(name, columns, [row for _, row in rows], places)


def _json_lines(name: str, text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: U+2028 is no line end
        if not line.strip():
            continue
        try:
            row = parse(line)
        except ValueError as error:
            raise AdarankError(
                f"{name}, line {number}: not JSON ({error}): {quote(line)}; one object a line"
            ) from None
        yield number, _object(name, f"line {number}", row, line)


def _from_array(name: str, text: str) -> Table:
    try:
        rows = cast("list[object]", parse(text))  # it starts with a bracket
    except ValueError as error:
        raise AdarankError(f"{name} is not JSON ({error}); give an array of objects") from None
    found = [(i, _object(name, f"row {i}", row, row)) for i, row in enumerate(rows, 1)]
    return _table(name, found, "row")


def _object(name: str, place: str, row: object, said: object) -> Row:
    if isinstance(row, dict):
        return row
    raise AdarankError(
        f'{name}, {place}: must be a JSON object such as {{"text": ...}}, got {quote(said)}'
    )


def _from_csv(name: str, text: str, delimiter: str) -> Table:
    csv.field_size_limit(2**31 - 1)
    notes, header = [], text.split("\n", 1)[0]
    if delimiter == "," and "," not in header:
        for other, said in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if other in header:
                delimiter = other
                notes.append(f"columns are separated by {said}")
                break
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, Row]] = []
    columns: list[str] = []
    try:
        for fields in reader:
            if not fields:
                continue
            if not columns:
                columns = [field.strip() for field in fields]
                if twice := [one for one in columns if columns.count(one) > 1]:
                    raise AdarankError(
                        f"{name}, line 1: two columns are called {twice[0]!r}; rename one"
                    )
                continue
            if len(fields) != len(columns):
                raise AdarankError(
                    f"{name}, line {reader.line_num}: {len(fields)} fields, the header has "
                    f"{len(columns)}; quote texts that contain {delimiter!r}"
                )
            rows.append((reader.line_num, dict(zip(columns, fields, strict=True))))
    except csv.Error as error:
        raise AdarankError(f"{name}, line {reader.line_num}: {error}; check the quotes") from None
    return replace(_table(name, rows), notes=notes)


def _from_parquet(name: str, content: bytes) -> Table:
    if find_spec("pyarrow") is None:
        raise AdarankImportError("a Parquet file needs pyarrow: pip install pyarrow")
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        said = str(error).strip().split("\n")[0]
        raise AdarankError(f"{name} is damaged or no Parquet file: {said}") from None
    return _table(name, list(enumerate(rows, 1)), "row")


def _datasets() -> ModuleType:
    if find_spec("datasets") is None:
        raise AdarankImportError(
            "folders and names of datasets need the library: pip install datasets"
        )
    import datasets

    library: ModuleType = datasets
    return library


def _from_folder(name: str, path: Path) -> Table:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(one.name for one in path.iterdir() if (one / "state.json").is_file())
        first = path / (splits or ["train"])[0]
        raise AdarankError(f"{name} has the splits {', '.join(splits)}; name one: {first}")
    if not (path / "state.json").is_file():
        raise AdarankError(
            f"{name} is a folder, and none that datasets' save_to_disk made; name a file in it "
            f"({', '.join(SUFFIXES)})"
        )
    library = _datasets()
    try:
        return _from_dataset(name, library.load_from_disk(str(path)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        said = str(error).strip().split("\n")[0]
        raise AdarankError(f"{name} is a damaged datasets folder: {said}") from None


def _from_hub(name: str) -> Table:
    missing = f"there is no data file {name!r}"
    suffix = Path(name).suffix.lower()
    looks_local = name.startswith((".", "/", "~")) or suffix in (*SUFFIXES, ".gz", ".bin", ".zip")
    if looks_local or not HUB_NAME.fullmatch(name):
        raise AdarankFileNotFoundError(f"{missing}; check the path")
    hub, _, split = name.partition(":")
    try:
        found = _datasets().load_dataset(hub, split=split or None)
    except AdarankImportError:
        raise AdarankFileNotFoundError(
            f"{missing}; if it is a dataset of the hub, pip install datasets"
        ) from None
    except Exception as error:  # of the network, the hub, a script, a configuration
        said = str(error).strip().split("\n")[0]
        raise AdarankFileNotFoundError(
            f"{missing}, and the hub gives no dataset of that name: {said}"
        ) from None
    if isinstance(found, dict):
        if len(found) > 1:
            first = next(iter(found))
            raise AdarankError(
                f"{name} has the splits {', '.join(found)}; name one: {name}:{first}"
            )
        found = next(iter(found.values()))
    return _from_dataset(name, found)


def _from_dataset(name: str, dataset: Any) -> Table:
    names = {
        column: list(feature.names)
        for column, feature in dataset.features.items()
        if hasattr(feature, "names") and hasattr(feature, "int2str")
    }
    rows = list(enumerate(dataset.with_format(None), 1))
    return replace(_table(name, rows, "row"), class_names=names)


def is_blank(value: object) -> bool:
    """No value: null, an empty or white string, NaN (of pandas)."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or isinstance(value, str) and not value.strip()


def quote(value: object, most: int = 60) -> str:
    """A value as a message shows it, cut where it is long."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."

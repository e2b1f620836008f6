"""Near-duplicates among any number of rows: candidates by DuckDB, out of core, then verified.

    with NearDuplicates(scratch, memory=512) as found:
        found.add(signatures)  # of all rows, in order
        found.search()
        for row, number in found.candidates():
            found.set_shingles(number, shingles_of_row)
        found.cluster(0.85)
        found.removed()  # the rows to remove, in order

Rows with equal texts are copies. Of the others, those that agree in a band of their signatures are
compared by the Jaccard index of their shingles; pairs at or above the threshold connect them to
components. In each component, a row is removed if it is similar to a row that stays and has a
smaller id: the smallest id stays, and no row goes that is only similar to one that goes too (each
version of a file is similar to the next one, but the last one not to the first one).

All of it is decided in the order of ids, so the order of rows, files and shards has no effect.
In memory are DuckDB's `memory` MiB and 12 bytes per candidate; the rest is in `scratch`.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ft.commits.minhash import BANDS, jaccard
from megatron_ft.errors import UserError
from megatron_ft.extras import require

# One row of a signature table: the row's id, digests of its compared text and of its line as
# hexadecimal digits, the hashes of its bands, and the method they were computed by.
SIGNATURE_COLUMNS = {
    "id": "string",
    "text": "string",
    "line": "string",
    "bands": "list:uint64",
    "method": "string",
}
MAX_COMPARISONS = 500  # of a row within a bucket or component; it stays if all of them fail
FETCH = 10_000  # rows of a query's result at a time
SAMPLES = 10


@dataclass
class Clusters:
    """What `NearDuplicates.cluster` did, for the report."""

    compared: int = 0  # pairs whose shingles were compared
    given_up: int = 0  # rows that reached MAX_COMPARISONS
    samples: list[tuple[int, int, float]] = field(default_factory=list)  # (removed, kept, similarity)


class NearDuplicates:
    """The rows that may be near-duplicates. A candidate has a number: its rank by id."""

    def __init__(self, scratch: Path, memory: int):
        self._duckdb: Any = require("duckdb", "dataset")
        self._arrow = require("pyarrow", "dataset")
        self._scratch = scratch
        self._db: Any = self._duckdb.connect(str(scratch / "near_duplicates.db"))
        self._db.execute(f"SET memory_limit = '{memory}MiB'")
        self._db.execute(f"SET threads = {len(os.sched_getaffinity(0))}")
        self._db.execute(f"SET temp_directory = '{str(scratch / 'spill').replace(chr(39), chr(39) * 2)}'")
        self._run("CREATE TABLE rows (row BIGINT, id VARCHAR, text UUID, line VARCHAR, bands UBIGINT[])")
        self._run("CREATE TABLE members (band UTINYINT, hash UBIGINT, row BIGINT)")
        self._run("BEGIN")  # ended by `search`; a transaction per `add` would be slow
        self._pending: list[dict[str, Any]] = []
        self.num_rows = self.num_candidates = 0
        self._store = ShingleStore(scratch)

    def add(self, signatures: Iterable[dict[str, Any]]) -> None:
        """Append rows of a signature table (SIGNATURE_COLUMNS)."""
        for signature in signatures:
            self._pending.append(signature)
            if len(self._pending) == FETCH:
                self._flush()

    def _flush(self) -> None:
        arrow, rows = self._arrow, self._pending
        columns = {name: arrow.array([row[name] for row in rows], "string") for name in ("id", "text", "line")}
        columns["bands"] = arrow.array([row["bands"] for row in rows], arrow.list_(arrow.uint64()))
        numbers = arrow.array(range(self.num_rows, self.num_rows + len(rows)), "int64")
        self._insert("rows", arrow.table({"row": numbers, **columns}))
        self.num_rows += len(rows)
        self._pending = []

    def search(self) -> None:
        """Find copies and candidates."""
        self._flush()
        self._run("COMMIT")
        # Only texts that occur twice are sorted, because most occur once.
        self._run("CREATE TABLE twice AS SELECT text FROM rows GROUP BY text HAVING count(*) > 1")
        self._run(
            "CREATE TABLE copies AS SELECT * FROM (SELECT row, first_value(row) OVER (PARTITION BY text "
            "ORDER BY id, line, row) AS first FROM rows SEMI JOIN twice USING (text)) WHERE row != first"
        )
        self._run("CREATE VIEW singles AS SELECT * FROM rows ANTI JOIN copies USING (row)")
        for band in range(1, BANDS + 1):
            self._run(
                f"INSERT INTO members SELECT {band}, bands[{band}], row FROM singles SEMI JOIN "
                f"(SELECT bands[{band}] AS hash FROM singles GROUP BY hash HAVING count(*) > 1) AS shared "
                f"ON shared.hash = singles.bands[{band}]"
            )
        self._run(
            "CREATE TABLE candidates AS SELECT row, row_number() OVER (ORDER BY id, line, text) - 1 AS number "
            "FROM rows SEMI JOIN members USING (row)"
        )
        ((self.num_candidates,),) = self._run("SELECT count(*) FROM candidates")

    def candidates(self) -> Iterator[tuple[int, int]]:
        """(row, number of the candidate), ordered by row."""
        return self._query("SELECT row, number FROM candidates ORDER BY row")

    def set_shingles(self, number: int, hashes: np.ndarray) -> None:
        """Store the shingles of a candidate: uint64 [s], in any order."""
        self._store.add(number, np.unique(hashes))

    def cluster(self, threshold: float) -> Clusters:
        """Decide which candidates go: those with a similarity of `threshold` or more, see above."""
        done = Clusters()
        parents = np.arange(self.num_candidates, dtype=np.int32)
        query = "SELECT band, hash, number FROM members JOIN candidates USING (row) ORDER BY band, hash, number"
        for _, bucket in groupby(self._query(query), key=lambda member: member[:2]):
            self._connect([number for _, _, number in bucket], parents, threshold, done)
        roots = np.array([_root(parents, number) for number in range(self.num_candidates)], np.int32)
        del parents
        kept = np.arange(self.num_candidates, dtype=np.int32)
        order = np.argsort(roots, kind="stable")
        limits = [*np.flatnonzero(np.diff(roots[order], prepend=-1)), self.num_candidates]
        for start, stop in pairwise(limits):
            if stop - start > 1:
                self._thin_out(order[start:stop].tolist(), kept, threshold, done)
        removed = np.flatnonzero(kept != np.arange(self.num_candidates))
        self._run("CREATE TABLE fates (number BIGINT, kept BIGINT)")
        self._insert("fates", self._arrow.table([removed, kept[removed].astype(np.int64)], names=["number", "kept"]))
        # A copy goes with its first copy, to the row that this one went to.
        self._run(
            "CREATE TABLE removed AS WITH gone AS (SELECT c.row, k.row AS kept FROM fates "
            "JOIN candidates c USING (number) JOIN candidates k ON k.number = fates.kept) "
            "SELECT * FROM gone UNION ALL "
            "SELECT copies.row, coalesce(gone.kept, copies.first) FROM copies LEFT JOIN gone ON gone.row = copies.first"
        )
        return done

    def removed(self) -> Iterator[tuple[int, str, str]]:
        """(row, its id, id of the row that stays in its place), ordered by row."""
        return self._query(
            "SELECT row, r.id, k.id FROM removed JOIN rows r USING (row) JOIN rows k ON k.row = kept ORDER BY row"
        )

    @property
    def copies(self) -> int:
        """The number of rows that go because an equal text stays."""
        ((count,),) = self._run("SELECT count(*) FROM copies")
        return count

    def sizes(self) -> dict[int, int]:
        """{size: number of clusters}; a cluster is a row that stays and those removed for it."""
        query = "SELECT count(*) + 1 AS size FROM removed GROUP BY kept"
        return dict(self._run(f"SELECT size, count(*) FROM ({query}) GROUP BY size ORDER BY size"))

    def id_of(self, number: int) -> str:
        """The id of a candidate."""
        ((id,),) = self._run(f"SELECT id FROM rows JOIN candidates USING (row) WHERE number = {number}")
        return id

    def _connect(self, bucket: list[int], parents: np.ndarray, threshold: float, done: Clusters) -> None:
        """Join the components of similar candidates of one bucket, given in order."""
        components: dict[int, list[int]] = {}  # the bucket's candidates by their component's root
        for number in bucket:
            root = _root(parents, number)
            comparisons = 0
            for other in [other for other in components if other != root]:
                for member in components[other]:
                    comparisons += 1
                    if comparisons > MAX_COMPARISONS:
                        break
                    if self._similarity(number, member, threshold, done):
                        components.setdefault(min(root, other), []).extend(components.pop(max(root, other), []))
                        parents[max(root, other)] = root = min(root, other)
                        break
            done.given_up += comparisons > MAX_COMPARISONS
            components.setdefault(root, []).append(number)

    def _thin_out(self, component: list[int], kept: np.ndarray, threshold: float, done: Clusters) -> None:
        """Set kept[number] for the members of a component, given in order."""
        stay: list[int] = []
        for number in component:
            for other in stay[:MAX_COMPARISONS]:
                if similarity := self._similarity(number, other, threshold, done):
                    kept[number] = other
                    if len(done.samples) < SAMPLES:
                        done.samples.append((number, other, similarity))
                    break
            else:
                done.given_up += len(stay) > MAX_COMPARISONS
                stay.append(number)

    def _similarity(self, a: int, b: int, threshold: float, done: Clusters) -> float:
        """Jaccard index of two candidates if it reaches the threshold, else 0."""
        few, many = sorted((self._store.size(a), self._store.size(b)))
        if few < threshold * many:
            return 0.0
        done.compared += 1
        similarity = jaccard(self._store.get(a), self._store.get(b))
        return similarity if similarity >= threshold else 0.0

    def _run(self, sql: str) -> list[tuple]:
        with self._failing():
            return self._db.execute(sql).fetchall()

    def _query(self, sql: str) -> Iterator[tuple]:
        """Rows of a query, a few at a time; other queries may run in between."""
        cursor = self._db.cursor()
        with self._failing():
            cursor.execute(sql)
            while found := cursor.fetchmany(FETCH):
                yield from found

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Turn an error of DuckDB, such as a full disk, into a UserError."""
        try:
            yield
        except self._duckdb.Error as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{self._scratch}: DuckDB failed ({reason}); give more --memory, or a --temporary-directory with more space"
            ) from error

    def _insert(self, name: str, table: Any) -> None:
        self._db.register("new_rows", table)
        self._run(f"INSERT INTO {name} SELECT * FROM new_rows")
        self._db.unregister("new_rows")

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()
        self._store.close()


class ShingleStore:
    """Sets of shingles on disk, by the number of their candidate."""

    _ENTRY = struct.Struct("<QQ")  # start and size of a set, in hashes

    def __init__(self, directory: Path):
        self._sets = open(directory / "shingles", "w+b", buffering=1 << 20)
        self._entries = open(directory / "shingles.index", "w+b", buffering=0)
        self._written = 0

    def add(self, number: int, hashes: np.ndarray) -> None:
        """Store a set, ascending: uint64 [s]."""
        os.pwrite(self._entries.fileno(), self._ENTRY.pack(self._written, len(hashes)), number * self._ENTRY.size)
        self._sets.write(hashes.tobytes())
        self._written += len(hashes)

    def size(self, number: int) -> int:
        """The number of shingles."""
        return self._entry(number)[1]

    def get(self, number: int) -> np.ndarray:
        """The set, ascending: uint64 [s]."""
        self._sets.flush()
        start, size = self._entry(number)
        return np.frombuffer(os.pread(self._sets.fileno(), 8 * size, 8 * start), np.uint64)

    def close(self) -> None:
        self._sets.close()
        self._entries.close()

    def _entry(self, number: int) -> tuple[int, int]:
        return self._ENTRY.unpack(os.pread(self._entries.fileno(), self._ENTRY.size, number * self._ENTRY.size))


def _root(parents: np.ndarray, number: int) -> int:
    """The smallest number of a component; shortens the path to it."""
    root = number
    while (above := int(parents[root])) != root:
        root = above
    while number != root:
        number, parents[number] = int(parents[number]), root
    return root

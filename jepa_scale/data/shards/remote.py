"""A remote folder of shards, whose files are fetched into the cache and checked against the index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jepa_scale.data.files.addresses import Refused, redacted_url
from jepa_scale.data.files.cache import SHARDS, Cache
from jepa_scale.utils.errors import DataError


class ShardError(DataError):
    """Damage of a shard, found before or while it is read.

    Attributes:
        where: path or URL of the shard, for people.
        shard: its name in the index.
        member: the sample's key, with the member's extension where only that one is bad; empty = the whole shard.
        what: description of the damage.
    """

    def __init__(self, where: str, shard: str, member: str, what: str) -> None:
        super().__init__(where, shard, member, what)  # as args, so that a loader worker can pickle it
        self.where, self.shard, self.member, self.what = where, shard, member, what

    def __str__(self) -> str:
        sample = f", sample {self.member}" if self.member else ""
        return f"{self.where}{sample}: {self.what}; restore the shard, or skip damaged samples with data.on_error=skip"


@dataclass(frozen=True, slots=True)
class Remote:
    """The files of one remote folder of shards, by URL.

    Attributes:
        template: the URL, ``{}`` in place of the file's name.
        name: name of the folder in the cache; that of no other data.
    """

    template: str
    name: str
    cache: Cache

    @property
    def folder(self) -> Path:
        """The local folder of the files that were fetched."""
        return self.cache.folder / SHARDS / self.name

    def url(self, name: str) -> str:
        return self.template.replace("{}", name)

    def fetch(self, name: str, shard: str, sha256: str, size: int | None = None) -> Path:
        """Return the path of the file in the cache; download it if it is not there. See :meth:`Cache.fetch`.

        Args:
            name: name of the file. shard: the shard that it belongs to, for errors.
            sha256: SHA-256 of the content. size: bytes, None = unknown.

        Raises:
            ShardError: the server has no such file, or one that differs from the index.
            InputError: it cannot be downloaded now, credentials are missing, or the cache cannot be written.
        """
        url = self.url(name)
        try:
            return self.cache.fetch(self.folder / name, url, sha256, size)
        except Refused as error:
            raise ShardError(redacted_url(url), shard, "", str(error)) from None

"""What is kept of a body: nothing that could be guessed from it where keys are set, and still the same for a repeat."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from api.src.errors import InvalidRequest
from api.src.main import create_app
from api.src.settings import Settings
from api.src.stores import passphrase
from api.src.stores.digests import BodyDigests, same_body
from api.src.stores.ledger import IdempotencyKey, Ledger
from api.src.stores.sealed import SealingKey
from tests.fakes import FakeBackend
from tests.stores.ledgers import LedgerStore, event

OLD, NEW = "an old key of the operator", "a new key of the operator"
NONE, BY_OLD = BodyDigests(), BodyDigests([OLD])
BY_BOTH, BY_NEW = BodyDigests([NEW, OLD]), BodyDigests([NEW])
BODY, OTHER = b'{"input": "Hello."}', b'{"input": "Goodbye."}'


def key(digests: BodyDigests, body: bytes = BODY) -> IdempotencyKey:
    first, *older = digests.of(body)
    return IdempotencyKey("again", first, tuple(older))


def test_with_a_key_the_stored_digest_is_no_plain_one() -> None:
    plain = hashlib.sha256(BODY).hexdigest()
    assert NONE.of(BODY) == (plain,)
    stored = BY_OLD.of(BODY)[0]
    assert plain not in stored
    assert len(stored) == 8 + 1 + 64
    assert stored == BodyDigests([OLD, NEW]).of(BODY)[0], "on every server the same"
    assert stored != BY_NEW.of(BODY)[0]
    assert stored != BY_OLD.of(OTHER)[0]


def test_a_body_is_recognised_across_rotations() -> None:
    none, old, both, new = NONE, BY_OLD, BY_BOTH, BY_NEW
    for before in (none, old, both, new):
        stored = before.of(BODY)[0]
        for after in (none, old, both, new):
            assert same_body(stored, after.of(BODY)), "never a false refusal"
    for before, after in ((none, none), (old, old), (old, both), (none, both), (both, new), (none, old)):
        assert not same_body(before.of(BODY)[0], after.of(OTHER)), "another body is known wherever the key is"
    assert same_body(old.of(BODY)[0], new.of(OTHER)), "where it is not, nothing can be said"


def test_what_is_stored_stays_known() -> None:
    """Digests and names of deployments that there are: to be changed with a migration alone."""
    stored = "9f17b436:6c5bb79e6eec416bed6676f633d925147f63eedfb8ed526aa1f316c4bbc06546"
    assert BY_OLD.of(BODY)[0] == stored
    name = "271b778b855e88fac1ba3ea1c32e17e7b075605e1c15e56dee577450de3144ed"
    assert SealingKey.from_passphrase(OLD, bytes(range(32))).name("entry") == name


def test_the_start_waits_for_all_keys_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the digests and those of the cache are made at the same time, as main makes them."""
    together = threading.Barrier(4, timeout=20)

    def slow(passphrase: str, salt: bytes, length: int) -> bytes:
        together.wait()
        return hashlib.shake_128(passphrase.encode() + salt).digest(length)

    monkeypatch.setattr(passphrase, "stretch", slow)
    settings = Settings(
        _env_file=None,
        cache_dir=tmp_path,
        ledger_url=f"sqlite:///{tmp_path}/ledger.db",
        encryption_key=[NEW, OLD],
    )
    create_app(settings, backend=FakeBackend())


def test_what_goes_wrong_in_making_a_key_is_no_secret_of_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(passphrase: str, salt: bytes, length: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr(passphrase, "stretch", fails)
    digests = BodyDigests([OLD])
    with pytest.raises(MemoryError):
        digests.wait()
    with pytest.raises(MemoryError):
        digests.of(BODY)


async def test_a_repeat_across_a_rotation_is_not_charged_again(store: LedgerStore, ledger: Ledger) -> None:
    await ledger.credit("ann", 100, "gift")
    for number, digests in enumerate([NONE, BY_OLD, BY_BOTH, BY_NEW]):
        async with ledger.hold("ann", f"req_{number}", 60, key=key(digests)) as hold:
            await hold.settle(event(hold, 60))
        assert await ledger.balance("ann") == 40
    with pytest.raises(InvalidRequest, match="different request body"):
        async with ledger.hold("ann", "req_x", 10, key=key(BY_NEW, OTHER)):
            pass
    assert await ledger.check() == []
    assert hashlib.sha256(BODY).hexdigest() in str(store.query("SELECT digest FROM idempotency_keys"))


async def test_what_is_stored_under_a_key_confirms_no_guess(store: LedgerStore, ledger: Ledger) -> None:
    async with ledger.hold("ann", "req_1", 10, key=key(BY_OLD)) as hold:
        await hold.settle(event(hold, 10))
    ((stored,),) = store.query("SELECT digest FROM idempotency_keys")
    assert hashlib.sha256(BODY).hexdigest() not in str(stored)

-- Amounts are integer micro-units, times are Unix seconds. The laws stand in ledger.py.

CREATE TABLE balances (
    account TEXT PRIMARY KEY NOT NULL,
    micros INTEGER NOT NULL CHECK (typeof(micros) = 'integer' AND micros >= 0)
) WITHOUT ROWID;

CREATE TABLE owners (
    id TEXT PRIMARY KEY NOT NULL,
    lease_until REAL NOT NULL
) WITHOUT ROWID;

-- Ids are never used again (AUTOINCREMENT): closed holds may outlive the row of their key.
CREATE TABLE idempotency_keys (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    account TEXT NOT NULL,
    value TEXT NOT NULL,
    digest TEXT NOT NULL,
    charged INTEGER NOT NULL DEFAULT 0 CHECK (charged >= 0),
    at REAL NOT NULL
);
CREATE INDEX idempotency_keys_by_value ON idempotency_keys (account, value);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (at);

-- held: what is reserved now, that is holds - releases - charges of its entries.
-- wallet: whether its entries move the account's balance.
CREATE TABLE holds (
    id INTEGER PRIMARY KEY,
    account TEXT NOT NULL,
    request_id TEXT NOT NULL,
    owner TEXT NOT NULL,
    key INTEGER,
    price INTEGER NOT NULL CHECK (price >= 0),
    held INTEGER NOT NULL CHECK (held >= 0),
    wallet INTEGER NOT NULL CHECK (wallet IN (0, 1)),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'released', 'lost')),
    at REAL NOT NULL,
    CHECK (state = 'open' OR held = 0)
);
CREATE INDEX holds_open_by_owner ON holds (owner) WHERE state = 'open';
CREATE INDEX holds_open_by_key ON holds (key) WHERE state = 'open' AND key IS NOT NULL;

-- An amount of 0 makes no entry, a credit excepted.
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL CHECK (kind IN ('credit', 'hold', 'charge', 'release')),
    account TEXT NOT NULL,
    hold INTEGER REFERENCES holds (id),
    micros INTEGER NOT NULL CHECK (micros >= 0),
    reference TEXT,
    at REAL NOT NULL,
    CHECK ((kind = 'credit') = (hold IS NULL)),
    CHECK ((kind = 'credit') = (reference IS NOT NULL))
);
CREATE UNIQUE INDEX entries_credit_once ON entries (account, reference) WHERE kind = 'credit';

CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN
    SELECT RAISE(ABORT, 'entries are append-only');
END;
CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN
    SELECT RAISE(ABORT, 'entries are append-only');
END;

CREATE TABLE usage_events (
    id INTEGER PRIMARY KEY,
    hold INTEGER NOT NULL REFERENCES holds (id),
    request_id TEXT NOT NULL,
    account TEXT NOT NULL,
    model TEXT NOT NULL,
    voice TEXT NOT NULL,
    characters INTEGER NOT NULL,
    audio_ms INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    price_micros INTEGER NOT NULL CHECK (price_micros >= 0),
    at REAL NOT NULL
);
CREATE INDEX usage_events_by_account ON usage_events (account);

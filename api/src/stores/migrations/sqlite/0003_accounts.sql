-- Who may ask, and how much. Times are Unix seconds. A row is an account, `NAME:USER` (an end user of it), or `NAME:*`
-- (the end users of it that have no row). NULL bounds: as the deployment has them; 0: none.

CREATE TABLE accounts (
    name TEXT PRIMARY KEY NOT NULL,
    requests_per_minute INTEGER CHECK (requests_per_minute >= 0),
    concurrent INTEGER CHECK (concurrent >= 0),
    characters_per_day INTEGER CHECK (characters_per_day >= 0),
    alert_characters_per_day INTEGER CHECK (alert_characters_per_day >= 0),
    trusted INTEGER NOT NULL CHECK (trusted IN (0, 1)),
    log_level TEXT NOT NULL CHECK (log_level IN ('', 'debug', 'info', 'warning', 'error')),
    disabled INTEGER NOT NULL CHECK (disabled IN (0, 1)),
    created_at REAL NOT NULL
) WITHOUT ROWID;

-- Rows are never deleted: that there is one, dead or alive, means that this deployment wants keys.
-- digest: SHA-256 of the key. hint: its first characters, to recognise it by.
CREATE TABLE api_keys (
    id TEXT PRIMARY KEY NOT NULL,
    account TEXT NOT NULL REFERENCES accounts (name),
    digest BLOB NOT NULL UNIQUE,
    hint TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    revoked_at REAL
);
CREATE INDEX api_keys_by_account ON api_keys (account);
CREATE TRIGGER api_keys_stay BEFORE DELETE ON api_keys BEGIN
    SELECT RAISE(ABORT, 'keys are revoked, never deleted');
END;

-- detail: a JSON object without secrets.
CREATE TABLE audit (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    actor TEXT NOT NULL,
    act TEXT NOT NULL,
    account TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX audit_by_account ON audit (account, id);
CREATE TRIGGER audit_keep BEFORE UPDATE ON audit BEGIN
    SELECT RAISE(ABORT, 'the audit is append-only');
END;
CREATE TRIGGER audit_stay BEFORE DELETE ON audit BEGIN
    SELECT RAISE(ABORT, 'the audit is append-only');
END;

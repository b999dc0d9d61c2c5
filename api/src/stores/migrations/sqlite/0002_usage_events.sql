-- Usage events know the end user, and may do without a hold: what costs nothing needs none. Told once then, by request.

CREATE TABLE new_usage_events (
    id INTEGER PRIMARY KEY,
    hold INTEGER REFERENCES holds (id),
    request_id TEXT NOT NULL,
    account TEXT NOT NULL,
    model TEXT NOT NULL,
    voice TEXT NOT NULL,
    characters INTEGER NOT NULL,
    audio_ms INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    price_micros INTEGER NOT NULL CHECK (price_micros >= 0),
    at REAL NOT NULL,
    end_user TEXT NOT NULL DEFAULT '',
    CHECK (hold IS NOT NULL OR price_micros = 0)
);
INSERT INTO new_usage_events
    (id, hold, request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at)
    SELECT id, hold, request_id, account, model, voice, characters, audio_ms, outcome, price_micros, at
    FROM usage_events;
DROP TABLE usage_events;
ALTER TABLE new_usage_events RENAME TO usage_events;

CREATE INDEX usage_events_by_account ON usage_events (account);
CREATE INDEX usage_events_by_user ON usage_events (account, end_user) WHERE end_user <> '';
CREATE UNIQUE INDEX usage_events_once ON usage_events (request_id) WHERE hold IS NULL;

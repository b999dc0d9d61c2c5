-- Usage events know the end user, and may do without a hold: what costs nothing needs none. Told once then, by request.

ALTER TABLE usage_events
    ALTER COLUMN hold DROP NOT NULL,
    ADD COLUMN end_user TEXT NOT NULL DEFAULT '',
    ADD CONSTRAINT usage_events_free CHECK (hold IS NOT NULL OR price_micros = 0);

CREATE INDEX usage_events_by_user ON usage_events (account, end_user, id) WHERE end_user <> '';
CREATE UNIQUE INDEX usage_events_once ON usage_events (request_id) WHERE hold IS NULL;

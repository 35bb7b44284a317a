-- The data model. It may be run again on a database of this version.
-- STRICT tables (SQLite 3.37) hold the types that are written here and nothing else.

BEGIN IMMEDIATE;

-- Whose file this is, and of which version: read before anything is written to it.
PRAGMA application_id = 0x5261666C; -- "Rafl"
PRAGMA user_version = 6;

CREATE TABLE IF NOT EXISTS raffle (
    -- Counts up with every raffle: short to refer to, and the key that pages are read by. One that
    -- was deleted leaves a gap, because a page may begin there.
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    total_tickets INTEGER NOT NULL CHECK (total_tickets BETWEEN 1 AND 9007199254740991),
    -- The place in the deck of the ticket that was issued last.
    issued_tickets INTEGER NOT NULL DEFAULT 0 CHECK (issued_tickets BETWEEN 0 AND total_tickets),
    -- Which public randomness was announced.
    randomness_source TEXT,
    -- Decides the deck from the start, and the draw together with the public randomness. Shown after the draw.
    secret BLOB NOT NULL CHECK (length(secret) = 32),
    -- The SHA-256 of the secret, in hexadecimal.
    draw_commitment TEXT NOT NULL CHECK (length(draw_commitment) = 64),
    -- Participants' addresses are hashed with it. Deleted by the draw: from then on the hashes say nothing.
    address_key BLOB CHECK (length(address_key) = 32),
    created_at TEXT NOT NULL,
    -- When the raffle closes by itself, fixed from the start. Times are compared as text.
    closes_at TEXT
        CHECK (closes_at > created_at)
        CHECK (closes_at <= strftime('%Y-%m-%dT%H:%M:%SZ', created_at, '+366 days')),
    -- A full raffle is closed.
    closed_at TEXT
        CHECK (closed_at >= created_at)
        CHECK (closed_at <= closes_at)
        CHECK (closed_at IS NOT NULL OR issued_tickets < total_tickets),
    -- Decides the draw. Unknown to everyone before the close.
    public_randomness TEXT CHECK (public_randomness IS NULL OR closed_at IS NOT NULL),
    -- Set once every win is stored.
    drawn_at TEXT
        CHECK (drawn_at >= closed_at)
        CHECK (drawn_at IS NULL OR public_randomness IS NOT NULL),
    CHECK ((drawn_at IS NULL) = (address_key IS NOT NULL))
) STRICT;

-- Finds the raffles that are due.
CREATE INDEX IF NOT EXISTS raffle_due ON raffle (closes_at) WHERE closed_at IS NULL;

CREATE TABLE IF NOT EXISTS prize (
    raffle INTEGER NOT NULL REFERENCES raffle,
    -- 1, 2, 3...: the manager's order.
    position INTEGER NOT NULL CHECK (position >= 1),
    name TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount >= 1),
    PRIMARY KEY (raffle, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS ticket (
    raffle INTEGER NOT NULL REFERENCES raffle,
    number INTEGER NOT NULL CHECK (number >= 1),
    -- HMAC-SHA256 of the address under the raffle's address_key, cut to 16 bytes.
    participant_hash BLOB NOT NULL CHECK (length(participant_hash) = 16),
    -- PBKDF2-HMAC-SHA256 of the verification code.
    salt BLOB NOT NULL CHECK (length(salt) = 16),
    iterations INTEGER NOT NULL CHECK (iterations >= 1000),
    code_hash BLOB NOT NULL CHECK (length(code_hash) = 32),
    -- No number twice.
    PRIMARY KEY (raffle, number),
    -- One ticket per address and raffle.
    UNIQUE (raffle, participant_hash)
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS win (
    raffle INTEGER NOT NULL,
    -- 1, 2, 3... through all prizes in their order.
    position INTEGER NOT NULL CHECK (position >= 1),
    -- Who holds the prize now. No reference: the draw takes its numbers from the deck, and looking
    -- each up doubles its time.
    ticket_number INTEGER NOT NULL CHECK (ticket_number >= 1),
    prize_position INTEGER NOT NULL,
    redeemed_at TEXT,
    PRIMARY KEY (raffle, position),
    -- One prize per ticket; verification looks a ticket up by it.
    UNIQUE (raffle, ticket_number),
    FOREIGN KEY (raffle, prize_position) REFERENCES prize (raffle, position)
) STRICT, WITHOUT ROWID;

-- Every change of a win, in order.
CREATE TABLE IF NOT EXISTS replacement (
    raffle INTEGER NOT NULL,
    -- 1, 2, 3...: the highest is the number of replacements.
    sequence INTEGER NOT NULL CHECK (sequence >= 1),
    -- The position of the win.
    position INTEGER NOT NULL,
    replaced_ticket_number INTEGER NOT NULL,
    ticket_number INTEGER NOT NULL CHECK (ticket_number <> replaced_ticket_number),
    -- No free text, because everyone can read it for good.
    reason TEXT NOT NULL CHECK (reason IN ('unclaimed', 'declined', 'ineligible')),
    replaced_at TEXT NOT NULL,
    PRIMARY KEY (raffle, sequence),
    -- Nobody is replaced twice; verification looks a ticket up by it.
    UNIQUE (raffle, replaced_ticket_number),
    -- Nobody is drawn twice.
    UNIQUE (raffle, ticket_number),
    FOREIGN KEY (raffle, position) REFERENCES win (raffle, position)
) STRICT, WITHOUT ROWID;

COMMIT;

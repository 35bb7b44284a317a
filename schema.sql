-- The data model. It may be run again on a database of this version.
-- STRICT tables (SQLite 3.37) hold the types that are written here and nothing else.

BEGIN IMMEDIATE;

-- Whose file this is, and of which version: read before anything is written to it.
PRAGMA application_id = 0x5261666C; -- "Rafl"
PRAGMA user_version = 4;

CREATE TABLE IF NOT EXISTS raffle (
    -- Counts up with every raffle: short to refer to, and the key that pages are read by.
    sequence INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    total_tickets INTEGER NOT NULL CHECK (total_tickets BETWEEN 1 AND 9007199254740991),
    -- 0 once the raffle is closed.
    available_tickets INTEGER NOT NULL CHECK (available_tickets BETWEEN 0 AND total_tickets),
    -- Not marked as drawn while tickets are available, whatever the code does.
    winners_drawn INTEGER NOT NULL DEFAULT 0 CHECK (winners_drawn = 0 OR (winners_drawn = 1 AND available_tickets = 0)),
    created_at TEXT NOT NULL,
    -- Read for the draw and for its receipt only.
    secret BLOB NOT NULL CHECK (length(secret) = 32),
    closed_at TEXT CHECK ((closed_at IS NULL) = (available_tickets > 0)),
    -- What the receipt of the draw adds.
    drawn_at TEXT CHECK ((drawn_at IS NULL) = (winners_drawn = 0)),
    public_randomness TEXT CHECK ((public_randomness IS NULL) = (winners_drawn = 0)),
    wins_sha256 TEXT CHECK ((wins_sha256 IS NULL) = (winners_drawn = 0)),
    -- The SHA-256 of the secret, in hexadecimal. NULL only while a database of version 2 is upgraded.
    draw_commitment TEXT CHECK (length(draw_commitment) = 64),
    -- NULL only while a database of version 3 is upgraded.
    issued_tickets INTEGER
        CHECK (issued_tickets BETWEEN 0 AND total_tickets AND available_tickets IN (0, total_tickets - issued_tickets)),
    -- Of a raffle that was closed before it was sold out, once it has been computed: see digest_of_tickets in draw.py.
    tickets_sha256 TEXT CHECK (length(tickets_sha256) = 64),
    -- Which public randomness was announced.
    randomness_source TEXT
) STRICT;

CREATE TABLE IF NOT EXISTS prize (
    raffle INTEGER NOT NULL REFERENCES raffle,
    -- 1, 2, 3...: the manager's order.
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount >= 1),
    PRIMARY KEY (raffle, position)
) STRICT, WITHOUT ROWID;

-- The cells of the shuffle that have been displaced: see issue_tickets in storage.py.
CREATE TABLE IF NOT EXISTS displaced (
    raffle INTEGER NOT NULL REFERENCES raffle,
    position INTEGER NOT NULL,
    ticket_number INTEGER NOT NULL,
    PRIMARY KEY (raffle, position)
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS ticket (
    raffle INTEGER NOT NULL REFERENCES raffle,
    number INTEGER NOT NULL CHECK (number >= 1),
    -- In network byte order: 4 bytes of IPv4, or 16 of IPv6 with the host bits set to zero.
    participant BLOB NOT NULL CHECK (length(participant) IN (4, 16)),
    -- PBKDF2-HMAC-SHA256 of the verification code.
    salt BLOB NOT NULL,
    iterations INTEGER NOT NULL,
    code_hash BLOB NOT NULL,
    -- No number twice.
    PRIMARY KEY (raffle, number),
    -- One ticket per address and raffle.
    UNIQUE (raffle, participant)
) STRICT, WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS win (
    raffle INTEGER NOT NULL,
    -- 1, 2, 3... through all prizes in their order. As a key it also makes a second draw impossible.
    position INTEGER NOT NULL,
    -- No reference: the draw takes its numbers from the tickets, and looking each up doubles its time.
    ticket_number INTEGER NOT NULL CHECK (ticket_number >= 1),
    prize INTEGER NOT NULL,
    redeemed_at TEXT,
    PRIMARY KEY (raffle, position),
    -- One prize per ticket; verification looks a ticket up by it.
    UNIQUE (raffle, ticket_number),
    FOREIGN KEY (raffle, prize) REFERENCES prize (raffle, position)
) STRICT, WITHOUT ROWID;

COMMIT;

-- The database of a server of version 2: a raffle that is drawn, one that is sold out and one that is open.
PRAGMA journal_mode = WAL;
PRAGMA application_id = 0x5261666C;
PRAGMA user_version = 2;
BEGIN TRANSACTION;
CREATE TABLE displaced (
    raffle INTEGER NOT NULL REFERENCES raffle,
    position INTEGER NOT NULL,
    ticket_number INTEGER NOT NULL,
    PRIMARY KEY (raffle, position)
) STRICT, WITHOUT ROWID;
INSERT INTO "displaced" VALUES(3,3,6);
CREATE TABLE prize (
    raffle INTEGER NOT NULL REFERENCES raffle,
    -- 1, 2, 3...: the manager's order.
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount >= 1),
    PRIMARY KEY (raffle, position)
) STRICT, WITHOUT ROWID;
INSERT INTO "prize" VALUES(1,1,'Bicycle',1);
INSERT INTO "prize" VALUES(1,2,'Größe',1);
INSERT INTO "prize" VALUES(2,1,'Book',2);
INSERT INTO "prize" VALUES(3,1,'Pen',1);
CREATE TABLE raffle (
    -- Counts up with every raffle: short to refer to, and the key that pages are read by.
    sequence INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    total_tickets INTEGER NOT NULL CHECK (total_tickets BETWEEN 1 AND 9007199254740991),
    available_tickets INTEGER NOT NULL CHECK (available_tickets BETWEEN 0 AND total_tickets),
    -- Not marked as drawn while tickets are available, whatever the code does.
    winners_drawn INTEGER NOT NULL DEFAULT 0 CHECK (winners_drawn = 0 OR (winners_drawn = 1 AND available_tickets = 0)),
    created_at TEXT NOT NULL,
    -- Its hash is published with the raffle, itself after the draw.
    secret BLOB NOT NULL CHECK (length(secret) = 32),
    sold_out_at TEXT CHECK ((sold_out_at IS NULL) = (available_tickets > 0)),
    -- What the receipt of the draw adds.
    drawn_at TEXT CHECK ((drawn_at IS NULL) = (winners_drawn = 0)),
    public_randomness TEXT CHECK ((public_randomness IS NULL) = (winners_drawn = 0)),
    wins_sha256 TEXT CHECK ((wins_sha256 IS NULL) = (winners_drawn = 0))
) STRICT;
INSERT INTO "raffle" VALUES(1,'fa54f356-cf4d-4233-a077-b5bd93ec5447','Drawn',3,0,1,'2026-11-24T13:31:11Z',X'E8C382A53EFF3809C2B7191BCEF2E2771ED3A177295628071C26D0ABE11C8FD0','2026-11-24T13:31:11Z','2026-11-24T13:31:11Z','7 13 21','d1f17e4c8b45a553501310cb0c7b2526f4a16ea930320c91baa8ccf77f6cdaa2');
INSERT INTO "raffle" VALUES(2,'280c779c-a6d8-4ba9-a7b5-cf695df5b4b0','Sold out',2,0,0,'2026-11-24T13:31:11Z',X'7C5934508FE6761CD1C1948EEFAC17E52D62220CBA1E1BA0D057D04CC90CFBD4','2026-11-24T13:31:11Z',NULL,NULL,NULL);
INSERT INTO "raffle" VALUES(3,'28806339-83f2-41af-b2c1-b4676ac6b79a','Open',6,3,0,'2026-11-24T13:31:11Z',X'E6FC316F29B4B90B941A9506AD7D15512264CE519904F2D788E936BC0D87A90E',NULL,NULL,NULL,NULL);
CREATE TABLE ticket (
    raffle INTEGER NOT NULL REFERENCES raffle,
    number INTEGER NOT NULL CHECK (number >= 1),
    -- In network byte order: 4 bytes of IPv4, or 16 of IPv6 with the bits that do not count set to zero.
    participant BLOB NOT NULL CHECK (length(participant) IN (4, 16)),
    -- The verification code, as PBKDF2-HMAC-SHA256 leaves it.
    salt BLOB NOT NULL,
    iterations INTEGER NOT NULL,
    code_hash BLOB NOT NULL,
    -- No number twice.
    PRIMARY KEY (raffle, number),
    -- One ticket per address and raffle.
    UNIQUE (raffle, participant)
) STRICT, WITHOUT ROWID;
INSERT INTO "ticket" VALUES(1,1,X'0A020003',X'B4A0D4AFDB87A91057E17964F9579BDA',1000,X'773DD8BCCCF6F4738FD7D5B735025DA743DEAB8E6D17A3C0E0BC2A5F484ED74C');
INSERT INTO "ticket" VALUES(1,2,X'0A020001',X'FDD4D36F101390E93B165B86CC773F12',1000,X'6FC03535E7D648AB1B5E6B884D2972DB4D806008D09EEC9F3D810A668D353F8F');
INSERT INTO "ticket" VALUES(1,3,X'0A020002',X'66241C912105D9B1289D04636211A200',1000,X'AF0B82044DEF12E03F7A7E96B7D7AD972AF4478BE6352698D472E4AD440D119A');
INSERT INTO "ticket" VALUES(2,1,X'0A020001',X'467CBCB266EE3E240DD79A64E162B3FD',1000,X'B1F75F4093F1A945DAD1D8302E33F0C8A9C45181B6160E271DBBE50458D7F449');
INSERT INTO "ticket" VALUES(2,2,X'0A020002',X'A5827A272B140A6A67C5EE9A5311FD79',1000,X'CE874E44855A7FD77BA40E82D81D0DCC275FED7CB923324457B879AC7B7CE8E3');
INSERT INTO "ticket" VALUES(3,3,X'0A020003',X'10C10067330225E2FB43FAC8F3CA2BD6',1000,X'3A1A41258562709718552DEAF3730C533248A78416D0F7A4B884B6259B31574A');
INSERT INTO "ticket" VALUES(3,4,X'0A020001',X'1D22FD6643D2ED8496CAB768CB179C4B',1000,X'FCD26FA384B3A05BD7DCBBEF0402C748CAF857036554EC7F9AF9359D09262860');
INSERT INTO "ticket" VALUES(3,5,X'0A020002',X'4C444BC5FDC6AB96B636B547141B8AB4',1000,X'C29364DB874C2697C1CD0C9308D436F6D6D5FBDF3FC8B2FB6BCAC88EA145D8FD');
CREATE TABLE win (
    raffle INTEGER NOT NULL,
    -- 1, 2, 3... through all prizes in their order. As a key it also makes a second draw impossible.
    position INTEGER NOT NULL,
    -- No reference: every number up to the total is a ticket by then, and looking each up doubles the time of a draw.
    ticket_number INTEGER NOT NULL CHECK (ticket_number >= 1),
    prize INTEGER NOT NULL,
    PRIMARY KEY (raffle, position),
    -- One prize per ticket; verification looks a ticket up by it.
    UNIQUE (raffle, ticket_number),
    FOREIGN KEY (raffle, prize) REFERENCES prize (raffle, position)
) STRICT, WITHOUT ROWID;
INSERT INTO "win" VALUES(1,1,2,1);
INSERT INTO "win" VALUES(1,2,3,2);
COMMIT;

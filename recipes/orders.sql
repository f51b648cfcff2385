-- The orders that recipes/export.py shows: commas, quotes, line breaks, NULL, an empty string and
-- other alphabets, all of which has to survive. In one transaction: if a server that fills the table
-- is killed, there is none, and the next server fills it. One that comes second finds it full.
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS orders (
    id INTEGER PRIMARY KEY,
    customer TEXT NOT NULL,
    note TEXT,
    quantity INTEGER NOT NULL,
    cents INTEGER NOT NULL
);
WITH RECURSIVE numbers(id) AS (
    SELECT 1 WHERE NOT EXISTS (SELECT 1 FROM orders)
    UNION ALL
    SELECT id + 1 FROM numbers WHERE id < 1000000
)
INSERT INTO orders
SELECT
    id,
    CASE id % 4
        WHEN 0 THEN 'Zoë ☕'
        WHEN 1 THEN 'Müller, Söhne & Co'
        WHEN 2 THEN '山田太郎'
        ELSE 'Jack "Mac" O''Neill'
    END,
    CASE id % 5
        WHEN 0 THEN ''
        WHEN 1 THEN NULL
        WHEN 2 THEN 'ring twice,
then wait'
        WHEN 3 THEN '=1+1'
        ELSE 'no hurry'
    END,
    id % 9 + 1,
    id * 37 % 10000
FROM numbers;
COMMIT;

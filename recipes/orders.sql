-- The orders of recipes/export.py. They contain commas, quotes, line breaks, NULL, an empty string
-- and other alphabets, all of which have to survive. This is one transaction: if the server is killed
-- meanwhile, there is no table, and the next server fills it. A second server finds the table full.
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

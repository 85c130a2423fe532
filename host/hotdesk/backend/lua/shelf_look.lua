-- What is on the shelf, and whether this worker's report is.
-- KEYS  plugins, reports
-- ARGV  me
-- Gives {names and records…}, "1" where the report is there
return {redis.call('HGETALL', KEYS[1]), redis.call('HEXISTS', KEYS[2], ARGV[1])}

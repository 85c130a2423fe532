-- A worker says how its plugins stand. Reports are counted, so that who reads them reads what is new.
-- KEYS  reports, count
-- ARGV  me, report
local count = redis.call('INCR', KEYS[2])
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], count .. ' ' .. time[1] .. ' ' .. ARGV[2])
return count

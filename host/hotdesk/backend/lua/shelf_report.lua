-- A worker says how its plugins stand. Reports are counted, so that who reads them reads what is new; from the time
-- in milliseconds on, so that the count does not go back when it is lost.
-- KEYS  reports, count
-- ARGV  me, report
local time = redis.call('TIME')
redis.call('SET', KEYS[2], string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), 'NX')
local count = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', count) .. ' ' .. time[1] .. ' ' .. ARGV[2])
return count

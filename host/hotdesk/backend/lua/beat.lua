-- A worker is alive, and asks who else is. Time is Redis's own.
-- A lease does not run out while nobody could renew it: after a silence of everybody all have another term.
-- KEYS  members
-- ARGV  me, milliseconds a lease lasts (0: it ends now), what is to be known of me
-- Gives {now, until when nobody counts as dead, names and leases…}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local term = tonumber(ARGV[2])
local clock = redis.call('HMGET', KEYS[1], '@last', '@grace')
local grace = tonumber(clock[2] or 0)
if term > 0 then
  if clock[1] and now - tonumber(clock[1]) > term then
    grace = now + term
    redis.call('HSET', KEYS[1], '@grace', grace)
  end
  redis.call('HSET', KEYS[1], '@last', now, ARGV[1], (now + term) .. ' ' .. ARGV[3])
else
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return {now, grace, redis.call('HGETALL', KEYS[1])}

-- A worker is alive, and asks who else is, if that has changed since it asked last. Time is Redis's own.
-- A lease does not run out while nobody could renew it: after a silence of everybody all have another term.
-- KEYS  members, leases
-- ARGV  me, milliseconds a lease lasts (0: it ends now), what is to be known of me, the number of what I know ("": nothing)
-- Gives {now, until when nobody counts as dead, number}, and the names and leases when the number is another
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local term = tonumber(ARGV[2])
local clock = redis.call('HMGET', KEYS[1], '@last', '@grace', '@number')
local grace, number = tonumber(clock[2] or 0), tonumber(clock[3] or 0)
local changed = 0
if term > 0 then
  if clock[1] and now - tonumber(clock[1]) > term then
    grace = now + term
    redis.call('HSET', KEYS[1], '@grace', grace)
  end
  redis.call('HSET', KEYS[1], '@last', now, ARGV[1], (now + term) .. ' ' .. ARGV[3])
  changed = redis.call('ZADD', KEYS[2], now + term, ARGV[1])
else
  redis.call('HDEL', KEYS[1], ARGV[1])
  changed = redis.call('ZREM', KEYS[2], ARGV[1])
end
if now >= grace then
  changed = changed + redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
end
if changed > 0 then -- a time, so that it is new as well where Redis has lost what it was
  number = math.max(number + 1, now)
  redis.call('HSET', KEYS[1], '@number', string.format('%.0f', number))
end
number = string.format('%.0f', number)
if number == ARGV[4] then
  return {now, grace, number}
end
return {now, grace, number, redis.call('HGETALL', KEYS[1])}

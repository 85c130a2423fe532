-- A worker is alive, and asks who else is, if that has changed since it asked last. Time is Redis's own.
-- A lease does not run out while nobody could renew it: after a silence of everybody, and after the clock was set back,
-- all that have one have another term. Who has none in `leases` is dead, whatever `members` still says. A word that
-- was sent long ago renews for what is left of the term since then, or not at all: who sent it may have died meanwhile.
-- KEYS  members, leases
-- ARGV  me, milliseconds a lease lasts (0: it ends now), what is to be known of me, the number of what I know ("": nothing),
--       when a lease ends at the latest that is renewed by this ("" where I do not know what the time is here)
-- Gives {now, until when nobody counts as dead, number}, and members and the names of the living when the number is another
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local term = tonumber(ARGV[2])
local clock = redis.call('HMGET', KEYS[1], '@last', '@grace', '@number')
local grace, number = tonumber(clock[2] or 0), tonumber(clock[3] or 0)
local changed = 0
if term > 0 then
  local before = redis.call('HGET', KEYS[1], ARGV[1])
  if not before or string.match(before, ' (.*)') ~= ARGV[3] then -- it is new or was forgotten, or says that it is leaving
    changed = 1
  end
  local last = tonumber(clock[1] or now)
  if now - last > term or now < last then
    grace = now + term
    redis.call('HSET', KEYS[1], '@grace', grace)
    if now < last then -- leases of a time that is yet to come: they end with the grace
      for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '(' .. string.format('%.0f', grace), '+inf')) do
        redis.call('ZADD', KEYS[2], grace, name)
      end
    end
  end
  local ends = math.max(math.min(now + term, tonumber(ARGV[5]) or now + term), grace)
  redis.call('HSET', KEYS[1], '@last', now)
  if ends > now then
    redis.call('HSET', KEYS[1], ARGV[1], ends .. ' ' .. ARGV[3])
    changed = changed + redis.call('ZADD', KEYS[2], 'GT', ends, ARGV[1])
  end
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
return {now, grace, number, redis.call('HGETALL', KEYS[1]), redis.call('ZRANGE', KEYS[2], 0, -1)}

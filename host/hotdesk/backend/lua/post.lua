-- Keep a reply outside of a turn. Any worker may; the owner delivers it.
-- KEYS  own, conversation, journal, seen, undelivered
-- ARGV  base ("": the caller tells it, once replicas have it), me, conversation, body, "1" to deliver, at
-- Gives {seq, owner}, or {0} when nothing was ever said there
if redis.call('EXISTS', KEYS[2]) == 0 then
  return {0}
end
local base, me, conversation = ARGV[1], ARGV[2], ARGV[3]
local seq = redis.call('RPUSH', KEYS[3], ARGV[4])
redis.call('ZADD', KEYS[4], 'GT', ARGV[6], conversation)
if ARGV[5] == '1' then
  redis.call('HSET', KEYS[5], seq .. ' ' .. conversation, ARGV[4])
end
local owner = redis.call('HGET', KEYS[1], 'owner') or ''
if base ~= '' then
  redis.call('SPUBLISH', base .. 'e:' .. conversation, 'P ' .. seq .. '\n' .. ARGV[4])
end
if owner ~= '' and owner ~= me and base ~= '' then
  redis.call('SPUBLISH', base .. 'h:' .. owner, 'p ' .. seq .. ' ' .. ARGV[5] .. '\n' .. ARGV[4])
end
return {seq, owner}

-- Have a dead letter answered once more.
-- KEYS  own, in, conversation, journal, dead
-- ARGV  base, me, conversation, seq, tag
-- Gives {1, n, owner, message}, or {0} when there is no such dead letter
local base, me, seq = ARGV[1], ARGV[2], ARGV[4]
local body = redis.call('LINDEX', KEYS[4], seq - 1) -- gone if its conversation was purged
if redis.call('HDEL', KEYS[5], seq .. ' ' .. ARGV[3]) == 0 or not body then
  return {0}
end
local n = redis.call('HINCRBY', KEYS[1], 'n', 1)
local owner = redis.call('HGET', KEYS[1], 'owner') or ''
redis.call('HSET', KEYS[3], 'o' .. seq, n .. ' ' .. ARGV[5])
redis.call('XADD', KEYS[2], n .. '-0', 's', seq, 'o', '', 'w', '0', 't', ARGV[5], 'b', body)
if owner ~= me and owner ~= '' then
  redis.call('SPUBLISH', base .. 'h:' .. owner, table.concat({'m', n, seq, 0, ARGV[5], 0, '-'}, ' ') .. '\n' .. body)
end
return {1, n, owner, body}

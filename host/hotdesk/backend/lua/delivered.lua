-- A reply reached its channel. Only the owner may say so.
-- KEYS  own, undelivered
-- ARGV  me, epoch, seq and conversation
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if own[1] ~= ARGV[1] or own[2] ~= ARGV[2] then
  redis.call('HINCRBY', KEYS[1], 'refused', 1)
  return -1
end
return redis.call('HDEL', KEYS[2], ARGV[3])

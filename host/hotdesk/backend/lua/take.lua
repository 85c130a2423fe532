-- Become the owner of a partition, if it is still as it was when that was decided.
-- KEYS  own
-- ARGV  me, the owner it had, the epoch it had
-- Gives {1, epoch}, or {0, owner, epoch} as they are
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
local owner, epoch = own[1] or '', own[2] or '0'
if owner ~= ARGV[2] or epoch ~= ARGV[3] then
  return {0, owner, epoch}
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
return {1, tostring(redis.call('HINCRBY', KEYS[1], 'epoch', 1))}

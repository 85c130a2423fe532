-- What is open in a partition.
-- KEYS  own, in, undelivered, tries
-- ARGV  the n to begin behind, how many at the most
-- Gives {owner, epoch, n, open messages, undelivered, tries}
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'n')
return {
  own[1] or '', own[2] or '0', own[3] or '0',
  redis.call('XRANGE', KEYS[2], '(' .. ARGV[1] .. '-0', '+', 'COUNT', ARGV[2]),
  redis.call('HGETALL', KEYS[3]), redis.call('HGETALL', KEYS[4]),
}

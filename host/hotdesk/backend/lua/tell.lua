-- Tell what is in no journal, such as chunks, of a turn that runs here. Only its owner may.
-- KEYS  own
-- ARGV  base, me, epoch, conversation, origin, news
-- Gives how many heard it, or -1 when the owner is another
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if own[1] ~= ARGV[2] or own[2] ~= ARGV[3] then
  redis.call('HINCRBY', KEYS[1], 'refused', 1)
  return -1
end
local heard = redis.call('SPUBLISH', ARGV[1] .. 'e:' .. ARGV[4], ARGV[6])
if ARGV[5] ~= '' and ARGV[5] ~= ARGV[2] then
  heard = heard + redis.call('SPUBLISH', ARGV[1] .. 'h:' .. ARGV[5], ARGV[6])
end
return heard

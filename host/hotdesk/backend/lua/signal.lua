-- Tell the owner of a conversation something.
-- KEYS  own
-- ARGV  base, news
-- Gives how many heard it: 0 when there is no owner, or none that listens
local owner = redis.call('HGET', KEYS[1], 'owner')
if not owner or owner == '' then
  return 0
end
return redis.call('SPUBLISH', ARGV[1] .. 'h:' .. owner, ARGV[2])

-- Delete a conversation in which nothing was said since, and no turn is open. Only the owner may.
-- KEYS  own, conversation, journal, seen, undelivered, dead
-- ARGV  me, epoch, conversation, before
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if own[1] ~= ARGV[1] or own[2] ~= ARGV[2] then
  redis.call('HINCRBY', KEYS[1], 'refused', 1)
  return -1
end
local seen = redis.call('ZSCORE', KEYS[4], ARGV[3])
if not seen or tonumber(seen) >= tonumber(ARGV[4]) then
  return 0
end
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  if string.find(field, '^o%d') then
    return 0
  end
end
for i = 5, 6 do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    for seq = 1, redis.call('LLEN', KEYS[3]) do
      redis.call('HDEL', KEYS[i], seq .. ' ' .. ARGV[3])
    end
  end
end
redis.call('UNLINK', KEYS[2], KEYS[3])
redis.call('ZREM', KEYS[4], ARGV[3])
return 1

-- The newest entries of a conversation below a seq.
-- KEYS  journal
-- ARGV  the seq, how many
-- Gives {seq of the first, entries…}
local last = math.min(redis.call('LLEN', KEYS[1]), tonumber(ARGV[1]) - 1)
local first = math.max(0, last - tonumber(ARGV[2]))
if last <= first then
  return {0, {}}
end
return {first + 1, redis.call('LRANGE', KEYS[1], first, last - 1)}

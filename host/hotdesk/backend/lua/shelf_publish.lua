-- Put a plugin's record on the shelf, if the one there is still the one that it was made from, and tell everyone.
-- The bytes came before, in parts; those of versions that nobody goes back to are dropped.
-- KEYS  plugins, the plugin's bundles
-- ARGV  channel, name, record before ("" where there was none), record, hash ("" where there is nothing to serve),
--       parts that it has, then the hashes to keep
-- Gives 1; 0 when the record is another by now; -1 when a part is not there
if (redis.call('HGET', KEYS[1], ARGV[2]) or '') ~= ARGV[3] then
  return 0
end
for part = 0, tonumber(ARGV[6]) - 1 do
  if redis.call('HEXISTS', KEYS[2], ARGV[5] .. ':' .. part) == 0 then
    return -1
  end
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[4])
local keep = {[ARGV[5]] = true}
for i = 7, #ARGV do
  keep[ARGV[i]] = true
end
for _, field in ipairs(redis.call('HKEYS', KEYS[2])) do
  if not keep[string.match(field, '^[^:]*')] then
    redis.call('HDEL', KEYS[2], field)
  end
end
redis.call('SPUBLISH', ARGV[1], ARGV[2])
return 1

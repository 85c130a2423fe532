-- One part of a bundle, unless it is larger than any is.
-- KEYS  a plugin's bundles
-- ARGV  field, bytes that a part has at the most
if redis.call('HSTRLEN', KEYS[1], ARGV[1]) > tonumber(ARGV[2]) then
  return false
end
return redis.call('HGET', KEYS[1], ARGV[1])

-- Take a message in. Any worker may: numbering is Redis's own, so no owner is needed.
-- KEYS  own, in, conversation, journal, seen, then the buckets of ids, the one to write first
-- ARGV  base ("": the caller tells it, once replicas have it), me, conversation, body, digest ("" where the host made the
--       id), at, channel, locale, wants chunks, seconds that a bucket lives, tag, "1" to be told the record
-- Gives {0, seq, n, owner, opened, record…}, and for an id that is known {1, seq, "1" while its turn is open}
local base, me, digest = ARGV[1], ARGV[2], ARGV[5]
if digest ~= '' then
  for i = 6, #KEYS do
    local seq = redis.call('HGET', KEYS[i], digest)
    if seq and tonumber(seq) <= redis.call('LLEN', KEYS[4]) then  -- not one of a conversation that was purged
      if base == '' then -- since 7.2 WAIT asks for one's own writes alone, and the first may have reached nobody
        redis.call('HSET', KEYS[i], digest, seq)
      end
      return {1, tonumber(seq), redis.call('HEXISTS', KEYS[3], 'o' .. seq)}
    end
  end
end
local seq = redis.call('RPUSH', KEYS[4], ARGV[4])
local n = redis.call('HINCRBY', KEYS[1], 'n', 1)
local owner = redis.call('HGET', KEYS[1], 'owner') or ''
local opened = 0
if seq == 1 then
  redis.call('HSET', KEYS[3], 'ch', ARGV[7], 'lo', ARGV[8], 'o1', n .. ' ' .. ARGV[11])
  opened = 1
else
  redis.call('HSET', KEYS[3], 'o' .. seq, n .. ' ' .. ARGV[11])
  opened = redis.call('HDEL', KEYS[3], 'x')
end
redis.call('XADD', KEYS[2], n .. '-0', 's', seq, 'o', me, 'w', ARGV[9], 't', ARGV[11], 'b', ARGV[4])
if digest ~= '' then
  if redis.call('HSET', KEYS[6], digest, seq) == 1 and redis.call('HLEN', KEYS[6]) == 1 then
    redis.call('EXPIRE', KEYS[6], ARGV[10])
  end
end
redis.call('ZADD', KEYS[5], 'GT', ARGV[6], ARGV[3])
if base ~= '' then
  redis.call('SPUBLISH', base .. 'e:' .. ARGV[3], 'M ' .. seq .. '\n' .. ARGV[4])
end
if owner == me then
  if ARGV[12] == '1' then
    return {0, seq, n, owner, opened, redis.call('HMGET', KEYS[3], 'ch', 'lo', 'as', 'tg', 'st')}
  end
elseif owner ~= '' and base ~= '' then
  redis.call('SPUBLISH', base .. 'h:' .. owner, table.concat(
    {'m', n, seq, opened, ARGV[11], ARGV[9], me}, ' ') .. '\n' .. ARGV[4])
end
return {0, seq, n, owner, opened}

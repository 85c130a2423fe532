-- End a turn: its replies, what it changed, and the news of it, all or nothing. Only its owner may.
-- KEYS  own, in, conversation, journal, undelivered, tries, dead, seen
-- ARGV  base ("": the caller tells it, once replicas have it), me, epoch, conversation, seq, tag, origin, head of the
--       news, "1" to deliver, "1" when it was tried before, "1" when it closes the conversation, what is kept of it as a
--       dead letter or "", how many fields of the record follow as names and values, how many names of fields follow that
--       go, then when the last reply was made, and the replies
-- Gives {1, seq of the first reply, n}, {0} when the turn had ended, {-1} when the owner is another
local base, me, conversation, seq = ARGV[1], ARGV[2], ARGV[4], ARGV[5]
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch')
if own[1] ~= me or own[2] ~= ARGV[3] then
  redis.call('HINCRBY', KEYS[1], 'refused', 1)
  return {-1}
end
local open = redis.call('HGET', KEYS[3], 'o' .. seq) or ''
local n, tag = string.match(open, '^(.-) (.*)$')
if tag ~= ARGV[6] then
  if base == '' then -- the end that was kept before may have reached nobody: what is said here is to be confirmed, too
    redis.call('HSET', KEYS[1], 'owner', me)
  end
  return {0}
end
redis.call('HDEL', KEYS[3], 'o' .. seq)
redis.call('XDEL', KEYS[2], n .. '-0')
if ARGV[10] == '1' then
  redis.call('HDEL', KEYS[6], n)
end
if ARGV[12] ~= '' then
  redis.call('HSET', KEYS[7], seq .. ' ' .. conversation, ARGV[12])
end
local at = 14
local fields = tonumber(ARGV[13])
if fields > 0 then
  redis.call('HSET', KEYS[3], unpack(ARGV, at + 1, at + 2 * fields))
end
at = at + 2 * fields
local gone = tonumber(ARGV[14])
if gone > 0 then
  redis.call('HDEL', KEYS[3], unpack(ARGV, at + 1, at + gone))
end
at = at + gone
if ARGV[11] == '1' then
  redis.call('HSET', KEYS[3], 'x', 1)
end
at = at + 1
if at < #ARGV then
  redis.call('ZADD', KEYS[8], 'GT', ARGV[at], conversation)
end
local first = 0
local news = base ~= '' and ARGV[8]
for i = at + 1, #ARGV do
  local number = redis.call('RPUSH', KEYS[4], ARGV[i])
  if first == 0 then
    first = number
  end
  if ARGV[9] == '1' then
    redis.call('HSET', KEYS[5], number .. ' ' .. conversation, ARGV[i])
  end
  if news then
    news = news .. '\n' .. ARGV[i]
  end
end
if news then
  news = 'E ' .. first .. '\n' .. news
  redis.call('SPUBLISH', base .. 'e:' .. conversation, news)
  if ARGV[7] ~= '' and ARGV[7] ~= me then
    redis.call('SPUBLISH', base .. 'h:' .. ARGV[7], news)
  end
end
return {1, first}

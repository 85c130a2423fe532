-- What is open in a partition, a page of it.
-- KEYS  own, in, undelivered, tries
-- ARGV  the n to begin behind, how many at the most, how many bytes of them are enough, "1" for what is undelivered,
--       "1" for tries
-- Gives {owner, epoch, n, open messages, "1" when there are more, undelivered, tries}
local own = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'n')
local page, after, left, bytes, more = {}, ARGV[1] .. '-0', tonumber(ARGV[2]), tonumber(ARGV[3]), true
while more and left > 0 and bytes > 0 do
  local count = math.min(left, 20)
  local some = redis.call('XRANGE', KEYS[2], '(' .. after, '+', 'COUNT', count)
  for _, entry in ipairs(some) do
    page[#page + 1] = entry
    after = entry[1]
    bytes = bytes - #entry[2][10] -- the message
  end
  left = left - #some
  more = #some == count
end
return {
  own[1] or '', own[2] or '0', own[3] or '0', page, more and 1 or 0,
  ARGV[4] == '1' and redis.call('HGETALL', KEYS[3]) or {}, ARGV[5] == '1' and redis.call('HGETALL', KEYS[4]) or {},
}

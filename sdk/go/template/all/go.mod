module author/plugin

go 1.24

require hotdesk v0.0.0

replace hotdesk => ./hotdesk

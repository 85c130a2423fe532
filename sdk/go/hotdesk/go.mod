module hotdesk

go 1.24

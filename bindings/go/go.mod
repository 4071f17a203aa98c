module github.com/wuerstchen/wuerstchen/bindings/go

go 1.24

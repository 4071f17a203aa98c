module github.com/wuerstchen/wuerstchen/examples/go/finetune

go 1.24

require github.com/wuerstchen/wuerstchen/bindings/go v0.0.0

replace github.com/wuerstchen/wuerstchen/bindings/go => ../../../bindings/go
